"""What may befall a run, with real processes, signals and disks: nothing is lost but the steps since the last save.

One rank's data that is not a number, and training over ranks altogether: tests/distributed/test_training.py.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rocket_fast.checkpoint import CheckpointFolder, load_checkpoint
from rocket_fast.config import EvalConfig, TrainConfig, to_plain
from rocket_fast.devices import DEVICES
from rocket_fast.errors import Failed
from rocket_fast.models.vision import ViTConfig
from rocket_fast.predict import Machines, Workload, memory, usable
from rocket_fast.trainer import Trainer, train

# --- killed at any moment ---------------------------------------------------------------------------------------------

SERVER = """
import contextlib, importlib, json, os, signal, sys, time
from rocket_fast import presets
from rocket_fast.__main__ import main
from rocket_fast.config import from_plain

def start(name, environment):
    if child := os.fork():
        return child
    os.environ.update(environment)
    for descriptor, file in ((1, name + ".out"), (2, name + ".err")):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    status = 1
    try:
        presets.PRESETS["tiny"] = lambda: from_plain(json.load(open(name + ".json")))
        status = main(["train", "--preset", "tiny"])
        json.dump(sorted(sys.modules), open(name + ".modules", "w"))
    finally:
        os._exit(status)

def signal_all(number):
    for child in children:
        os.kill(child, number)  # not waited for yet, so its number is still its own

def wait():
    ended = {}
    while len(ended) < len(children):
        for child in set(children) - set(ended):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                ended[child] = os.waitstatus_to_exitcode(status)
        if any(ended.values()):  # others would wait for it
            for child in set(children) - set(ended):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [ended[child] for child in children]

for line in sys.stdin:
    order, argument = json.loads(line)
    answer = None
    if order == "start":
        children = [start(*each) for each in argument]
    elif order == "signal":
        if argument == signal.SIGKILL:  # none may notice that another is gone
            signal_all(signal.SIGSTOP)
        signal_all(argument)
    elif order == "wait":
        answer = wait()
    elif order == "import":  # what one has imported, the next ones find imported
        for module in json.load(open(argument + ".modules")):
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    print(json.dumps(answer), flush=True)
"""


class Lives:
    """The command ``train``, in children of a process that has imported everything and started no thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "server.py").write_text(SERVER)
        command = [sys.executable, str(folder / "server.py")]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def order(self, order: str, argument: object = None) -> Any:
        """Have the process do something: ``start`` names, ``signal`` a number, ``wait`` for each one's exit status."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps([order, argument]) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, config: TrainConfig, ranks: int = 1) -> None:
        """Begin to train, in so many processes, which are told what torchrun tells."""
        name = str(self.folder / config.name)
        Path(f"{name}.json").write_text(json.dumps(to_plain(config)))
        environments: list[dict[str, str]] = [{}]
        if ranks > 1:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
            environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.order("start", [(name, each) for each in environments])

    def whole(self, config: TrainConfig, ranks: int = 1) -> float:
        """Train to the end; how many seconds that took."""
        began = time.monotonic()
        self.start(config, ranks)
        assert self.order("wait") == [0] * ranks, self.errors(config)
        return time.monotonic() - began

    def is_killed_after(self, seconds: float, config: TrainConfig) -> bool:
        """Kill what was started after so many seconds; whether it had not ended by then."""
        time.sleep(seconds)
        self.order("signal", signal.SIGKILL)
        status = set(self.order("wait"))
        assert status <= {0, -signal.SIGKILL}, self.errors(config)
        return status != {0}

    def errors(self, config: TrainConfig) -> str:
        """What was written to stderr."""
        return (self.folder / f"{config.name}.err").read_text()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory, tiny_config_in: Callable[[Path], TrainConfig]) -> Iterator[Lives]:
    folder = tmp_path_factory.mktemp("lives")
    started = Lives(folder)
    first = replace(tiny_config_in(folder), name="first")
    started.whole(first)  # which also compiles what is compiled
    started.order("import", str(folder / "first"))
    yield started
    started.server.communicate(timeout=60)  # closes its input, which ends it


def logged_steps(config: TrainConfig) -> list[dict]:
    """The records of steps; the last line may be torn."""
    path = config.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "loss" in record]


def require_whole(config: TrainConfig) -> int:
    """Every file that has its final name can be read; the step of the newest checkpoint, 0 without one."""
    folder = config.folder
    newest = 0
    for path in (folder / "checkpoints").glob("[!.]*"):
        step = load_checkpoint(path)["step"]
        newest = max(newest, step if path.name.startswith("step-") else 0)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("*.safetensors"):
        load_file(path)
    return newest


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 20), (2, 4)], ids=["one process", "FSDP2"])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(
    tiny_config: TrainConfig, lives: Lives, ranks: int, kills: int
):
    """SIGKILL while it starts, steps, saves, evaluates, or ends: nothing is lost but steps since the last save."""
    seed = time.time_ns()
    print(f"seed of the moments: {seed}")
    rng, every = random.Random(seed), 3
    loop = replace(tiny_config.loop, epochs=10, checkpoint_every=every, eval_every_epochs=4, weight_average=0.9)
    base = replace(tiny_config, data=replace(tiny_config.data, batch_size=8, workers=1), loop=loop)
    if ranks > 1:  # a tower without batch norm, whose statistics take many exchanges
        vision = ViTConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2)
        loop = replace(loop, epochs=2, eval_every_epochs=1, parallel="fsdp", hang_timeout_s=120)
        base = replace(base, model=replace(base.model, vision=vision), loop=loop)
    whole, killed = replace(base, name="whole"), replace(base, name="killed")
    start = lives.whole(replace(base, name="start", loop=replace(base.loop, max_steps=1)), ranks)
    took = lives.whole(whole, ranks)
    saved, lived = 0, []
    while len(lived) < kills:
        seconds = rng.uniform(0, 2 * (start + took / kills))  # so that they spread over the whole run
        lives.start(killed, ranks)
        lived += [round(seconds, 3)] * lives.is_killed_after(seconds, killed)
        before, saved = saved, require_whole(killed)
        last = max((record["step"] for record in logged_steps(killed)), default=0)
        assert saved >= before, (seed, lived)
        assert last - saved <= 2 * every, (seed, lived)  # a checkpoint may be being written while steps go on
    lives.whole(killed, ranks)
    assert_same_run(whole, killed, f"seed {seed}, killed after {lived} s")
    told = (lives.folder / "killed.out").read_text()
    assert "cannot be read" not in told, told


def assert_same_run(whole: TrainConfig, other: TrainConfig, where: str) -> None:
    """Every step once and with the same loss, the same files, weights and states bit for bit, the loader's place."""
    losses = [[(r["step"], r["loss"]) for r in logged_steps(config)] for config in (whole, other)]
    assert losses[0] == losses[1], where
    names = [sorted(path.relative_to(c.folder) for path in c.folder.rglob("*")) for c in (whole, other)]
    assert names[0] == names[1], where
    for name in [name for name in names[0] if (whole.folder / name).is_symlink()]:
        assert (whole.folder / name).readlink() == (other.folder / name).readlink(), (name, where)
    for name in [name for name in names[0] if name.suffix == ".safetensors"]:  # of FSDP2, all of a rank's tensors
        weights = [load_file(config.folder / name) for config in (whole, other)]
        torch.testing.assert_close(*weights, rtol=0, atol=0, msg=lambda m, n=name: f"{n}, {where}: {m}")
    for name in [name for name in names[0] if name.suffix == ".pt"]:
        states = [load_checkpoint(config.folder / name) for config in (whole, other)]
        optimizers = [state.pop("optimizer", {"state": {}})["state"] for state in states]
        for tensors in (optimizers, *([state.pop(part, None) for state in states] for part in ("model", "average"))):
            torch.testing.assert_close(*tensors, rtol=0, atol=0, msg=lambda m, n=name: f"{n}, {where}: {m}")
        for state in states:
            del state["config"]  # which names the run
        assert states[0] == states[1], (name, where)


# --- asked to stop ----------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_a_command_that_is_to_end_in_thirty_seconds_saves_and_exits_with_128_plus_the_signal(
    tiny_config: TrainConfig, lives: Lives
):
    config = replace(tiny_config, name="stopped", loop=replace(tiny_config.loop, epochs=500, checkpoint_every=10_000))
    lives.start(config)
    patience = time.monotonic() + 300
    while not any(record["step"] >= 3 for record in logged_steps(config)):
        assert time.monotonic() < patience, lives.errors(config)
        time.sleep(0.01)
    for _ in range(2):  # launchers often send it twice
        lives.order("signal", signal.SIGTERM)
    began = time.monotonic()
    assert lives.order("wait") == [128 + signal.SIGTERM], lives.errors(config)
    assert time.monotonic() - began < 30
    assert "stopped and saved at step" in lives.errors(config)
    assert require_whole(config) == logged_steps(config)[-1]["step"] >= 3


# --- no room ----------------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tiny_config: TrainConfig, tmp_path: Path, monkeypatch, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    config = replace(tiny_config, out=disk, eval=EvalConfig())
    filler, step = disk / "filler", Trainer.train_step

    def fill_and_free(self: Trainer, batch: object) -> object:
        if self.step == 5:
            filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 2**15))  # leaves room for the log
        if self.step == 9:
            filler.unlink(missing_ok=True)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", fill_and_free)
    try:
        assert train(config).step == 12
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(
            r"step-00000008\.pt could not be written \(.*; 0\.\d MiB are free there\); the checkpoints", said
        )
        paths = CheckpointFolder(config.folder / "checkpoints", keep=9).step_paths()
        assert [load_checkpoint(path)["step"] for path in paths] == [4, 12]
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 2**20))
        with pytest.raises(Failed, match=r"step-0000000\d\.pt could not be written"):
            train(replace(config, name="last", loop=replace(config.loop, max_steps=3)))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


CARDS = ["NVIDIA H100 80GB HBM3", "A card"]


@pytest.mark.parametrize("name", CARDS)
def test_out_of_memory_proposes_what_the_cost_model_says_fits(tiny_config: TrainConfig, name: str, monkeypatch):
    def full(self: Trainer, batch: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    vision = ViTConfig(image_size=16, patch_size=8, width=64, layers=4, heads=2)
    model = replace(tiny_config.model, vision=vision, text=replace(tiny_config.model.text, width=32, layers=4))
    config = replace(tiny_config, model=model, data=replace(tiny_config.data, batch_size=96))
    workload, machines = Workload.of(config), Machines(device=DEVICES["h100"])
    least, needed = (memory(workload, machines, rows).total for rows in (1, 96))
    total = (least + needed) / 2 / usable(1.0)  # enough for about half of the batch
    card = types.SimpleNamespace(name=name, total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**29)
    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(Failed, match=r"out of memory at step 1: 0\.5 of \d\.\d GiB taken") as caught:
        train(config)
    said = str(caught.value)
    if name == "A card":
        assert "try a smaller data.batch_size" in said
        return
    policy, micro_batches, batch = re.search(
        r"what should fit: checkpointing (\w+) in the towers or loop\.accumulation (\d+) or data\.batch_size (\d+)",
        said,
    ).groups()  # type: ignore[union-attr]
    available = usable(total)
    assert 1 <= int(batch) < 96
    assert memory(workload, machines, int(batch)).total <= available < needed
    assert memory(workload, machines, 96, int(micro_batches)).total <= available
    assert memory(workload.with_checkpointing(policy), machines, 96).total <= available


# --- one of several ranks ---------------------------------------------------------------------------------------------

FAULT = """
import json, os, sys, time
from rocket_fast.config import from_plain
from rocket_fast.trainer import Trainer, train

step = Trainer.train_step

def faulty(self, batch):
    if self.step == 3 and os.environ["RANK"] == "1":
        if sys.argv[2] == "dies":
            raise RuntimeError("a loose cable")
        while True:
            time.sleep(1)
    return step(self, batch)

Trainer.train_step = faulty
train(from_plain(json.load(open(sys.argv[1]))))
"""


@pytest.mark.system
@pytest.mark.parametrize(
    ("fault", "traces"), [("dies", ["RuntimeError: a loose cable"]), ("hangs", ["Timeout (0:00:06)!", "in faulty"])]
)
def test_a_rank_that_fails_ends_all(tiny_config: TrainConfig, tmp_path: Path, fault: str, traces: list[str]):
    """Within a minute, saying which and where; what was saved can be continued."""
    loop = replace(tiny_config.loop, hang_timeout_s=6.0, checkpoint_every=2)
    config = replace(tiny_config, loop=loop, eval=EvalConfig())
    description, script = tmp_path / "run.json", tmp_path / "fault.py"
    script.write_text(FAULT)
    description.write_text(json.dumps(to_plain(config)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(description)]
    process = subprocess.Popen([*launch, fault], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(record["step"] >= 3 for record in logged_steps(config)):
        time.sleep(0.05)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"rank +: 1 \(local_rank: 1\)", said) or fault == "hangs", said
    for trace in traces:
        assert trace in said
    assert train(config).step == 12
    assert [record["step"] for record in logged_steps(config)] == list(range(1, 13))
