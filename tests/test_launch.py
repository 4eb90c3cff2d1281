"""Launching: real torchrun processes, and a SLURM of shell scripts that runs, times out and requeues real jobs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rocket_fast.__main__ import main
from rocket_fast.errors import installed
from rocket_fast.launch import SlurmConfig

slurm = pytest.mark.skipif(not installed("submitit"), reason="needs the extra slurm")
SMALL = ["--data.batch-size", "16", "--data.workers", "1", "--loop.threads", "1", "--loop.log-every", "1"]
COMMAND = [sys.executable, "-m", "rocket_fast"]


@pytest.fixture
def place(tmp_path: Path, write_shard: Callable, monkeypatch) -> Path:
    """A folder, and the current one, with the data that the preset debug takes."""
    data = tmp_path / "data/emoji"
    for name in ("val", "heldout", "openmoji", "unseen"):
        write_shard(data / f"{name}-0.tar", 40, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def steps(place: Path) -> list[int]:
    path = place / "runs/debug/metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and '"loss"' in line]


@slurm
def test_a_dry_run_writes_the_script_it_would_send(place: Path, capsys):
    options = ["--nodes", "2", "--gpus", "8", "--hours", "12.5", "--partition", "p", "--mem-gb", "400", "--dry-run"]
    assert main(["launch", "slurm", *options, "--setup", "module load cuda", "--", "train", "--preset", "debug"]) == 0
    script = capsys.readouterr().out
    for line in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=8",
        "time=750",
        "partition=p",
        "mem=409600MB",
        "job-name=debug",
        "signal=USR2@180",
        "requeue",
        "open-mode=append",
    ):
        assert f"#SBATCH --{line}\n" in script, line
    folder = place / "runs/debug/slurm"
    assert "\nmodule load cuda\n" in script
    assert re.search(rf"\nsrun .*--kill-on-bad-exit=1 .*submitit.core._submit {re.escape(str(folder))}\n", script)
    assert (folder / "dry-run.sh").read_text() == script.rstrip("\n") + "\n"
    assert [path.name for path in folder.iterdir()] == ["dry-run.sh"]
    subprocess.run(["bash", "-n", str(folder / "dry-run.sh")], check=True)


@slurm
@pytest.mark.parametrize("how", [["local", "--nproc", "2"], ["slurm", "--dry-run"]], ids=["local", "slurm"])
def test_mistakes_are_found_before_anything_is_started(how: list[str], place: Path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["launch", *how, "--", "train", "--preset", "debug", "--optim.rl", "1"])
    assert left.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err
    for rest, message in (
        ([], "launch, behind --: got 'nothing', expected train and its options"),
        (["--", "eval", "runs/demo"], "launch, behind --: got 'eval', expected train and its options"),
        (
            ["--", "train", "--preset", "debug", "--data.batch-size", "15"],
            f"data.batch_size: got 15, expected a multiple of the number of processes, {2 if how[0] == 'local' else 8}",
        ),
        (["--", "train", "--preset", "debgu"], "preset: got 'debgu', expected debug"),
    ):
        assert main(["launch", *how, *rest]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (place / "runs").exists()


@slurm
def test_without_slurm_it_says_so(place: Path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(place))
    assert main(["launch", "slurm", "--", "train", "--preset", "debug"]) == 1
    assert "sbatch and srun are not to be found" in capsys.readouterr().err
    for wrong in ({"nodes": 0}, {"gpus": -1}, {"hours": 0.05}, {"mem_gb": 0.0}, {"cpus": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}: got"):
            SlurmConfig(**wrong)


@pytest.mark.system
@pytest.mark.slow
def test_local_processes_train_together_and_pass_a_stop_on(place: Path):
    launch = [*COMMAND, "launch", "local", "--nproc", "2", "--", "train", "--preset", "debug", *SMALL]
    process = subprocess.Popen(
        [*launch, "--loop.epochs", "500"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and len(steps(place)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "cpu x 2" in out
    assert "stopped and saved at step" in errors
    assert errors.splitlines()[-1] == "rocket-fast: the processes were stopped; the same command continues"
    failed = subprocess.run([*launch, "--loop.epochs", "400"], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1, failed.stderr
    assert "loop.epochs: 500 -> 400" in failed.stderr
    assert "rocket-fast: process" in failed.stderr.splitlines()[-1]


SBATCH = """#!/bin/bash
cp "$1" {state}/script.sh
echo "Submitted batch job 4711"
"""
SRUN = """#!/bin/bash
while [ "$1" != "{python}" ]; do shift; done
export SLURM_NTASKS=2 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST=localhost,otherhost SLURM_LOCALID=0
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_NODEID=$rank "$@" > {state}/$rank.out 2> {state}/$rank.err &
    echo $! >> {state}/pids
done
wait
"""
SCONTROL = """#!/bin/bash
echo "$@" >> {state}/scontrol
"""


@slurm
@pytest.mark.system
@pytest.mark.slow
def test_a_job_that_runs_out_of_time_saves_requeues_and_continues(place: Path, monkeypatch, capsys):
    state = place / "state"
    state.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        path = place / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(state=state, python=sys.executable))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.environ['PATH']}")
    options = ["--nodes", "2", "--gpus", "0", "--hours", "1"]
    command = ["train", "--preset", "debug", *SMALL, "--loop.epochs", "30", "--loop.checkpoint-every", "1000"]
    assert main(["launch", "slurm", *options, "--", *command]) == 0
    assert capsys.readouterr().out.startswith("job 4711: debug on 2 x 1 processes; logs ")

    def start() -> subprocess.Popen:
        (state / "pids").unlink(missing_ok=True)
        environment = {**os.environ, "SLURM_JOB_ID": "4711"}
        return subprocess.Popen(["bash", str(state / "script.sh")], env=environment)

    def said() -> str:
        return "".join(path.read_text() for path in sorted(state.glob("*.err")))

    job = start()
    deadline = time.monotonic() + 120
    while job.poll() is None and len(steps(place)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in (state / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR2)
    job.wait(timeout=90)
    assert (state / "scontrol").read_text().split() == ["requeue", "4711"], said()
    saved = int(re.search(r"stopped and saved at step (\d+)", (state / "0.err").read_text())[1])
    assert saved >= 4
    assert "cpu x 2" in (state / "0.out").read_text()

    assert start().wait(timeout=200) == 0
    assert f"continuing at step {saved} of 60" in (state / "0.out").read_text(), said()
    assert steps(place) == list(range(1, 61))
    assert (place / "runs/debug/eval.json").is_file()
    assert (state / "scontrol").read_text().count("requeue") == 1
