"""`rocket-fast launch`: the train command on every GPU of this machine (torchrun) or of a SLURM job (submitit).

A SLURM job has one task a GPU. Before its time is up SLURM sends SIGUSR2: the trainer finishes the step, saves and
stops, and the job puts itself back into the queue, where the same command continues. A preempted job is put back by
SLURM itself (``--requeue``), after the SIGTERM on which the trainer saves too; one that was cancelled stays cancelled.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rocket_fast.config import TrainConfig
from rocket_fast.errors import Failed, optional_import, require
from rocket_fast.files import write_atomically

# --- this machine -----------------------------------------------------------------------------------------------------


def _require_divisible(train: TrainConfig, processes: int) -> None:
    expected = f"a multiple of the number of processes, {processes}"
    require(train.data.batch_size % processes == 0, "data.batch_size", train.data.batch_size, expected)


def launch_local(arguments: Sequence[str], train: TrainConfig, *, nproc: int | None, restarts: int) -> None:
    """Run ``rocket-fast train ARGUMENTS``, which is ``train``, in ``nproc`` processes; ``Failed`` if one of them fails.

    None takes one a GPU, or one where there is none. After a failure all processes start again, up to ``restarts``
    times, from the last checkpoint. A signal to stop is passed on, and the run saves.
    """
    nproc = max(1, torch.cuda.device_count()) if nproc is None else nproc
    require(nproc >= 1, "nproc", nproc, "a number >= 1")
    require(restarts >= 0, "restarts", restarts, "a number >= 0")
    _require_divisible(train, nproc)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    own = ["--standalone", "--nproc-per-node", str(nproc), "--max-restarts", str(restarts)]
    try:
        run.main([*own, "--module", "rocket_fast", "train", *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        mistaken = failure.exitcode == 2  # what rocket-fast ends with for a mistake of the person's
        advice = "" if mistaken else ", and the same command continues from the last checkpoint"
        raise Failed(
            f"process {rank} of {nproc} ended first, with exit status {failure.exitcode}; what it said is above{advice}"
        ) from error
    except SignalException as stop:
        from rocket_fast.trainer import Interrupted

        raise Interrupted("the processes were stopped; the same command continues", int(stop.sigval)) from stop


# --- SLURM ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What to ask SLURM for."""

    nodes: int = 1
    """Machines."""
    gpus: int = 8
    """GPUs, and so processes, on each; 0 is one process on each without a GPU."""
    hours: float = 24.0
    """Time limit of one start; a run that needs longer is put back into the queue when it is up."""
    partition: str | None = None
    """Partition; None is the cluster's default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    exclude: str | None = None
    """Nodes to keep away from."""
    cpus: int = 8
    """CPU cores for each process: data.workers and one more."""
    mem_gb: float | None = None
    """Memory of each node, GB; None is the cluster's default."""
    setup: tuple[str, ...] = ()
    """Shell commands to run first on the first node, such as 'module load cuda'."""
    warning_s: int = 180
    """Seconds before the time limit at which the run saves and makes way."""
    requeues: int = 100
    """How often the run may reach its time limit and be put back."""
    folder: Path | None = None
    """Where job files and logs go; None is slurm/ in the run's folder. All nodes must see it."""
    dry_run: bool = False
    """Write and print the sbatch script, and send nothing."""

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "nodes", self.nodes, "a number >= 1")
        require(self.gpus >= 0, "gpus", self.gpus, "a number >= 0")
        require(self.cpus >= 1, "cpus", self.cpus, "a number >= 1")
        require(self.mem_gb is None or self.mem_gb > 0, "mem_gb", self.mem_gb, "a positive number or None")
        require(self.requeues >= 0, "requeues", self.requeues, "a number >= 0")
        require(self.warning_s >= 1, "warning_s", self.warning_s, "a number >= 1")
        least = (self.warning_s + 60) / 3600
        require(self.hours > least, "hours", self.hours, f"more than warning_s = {self.warning_s} and a minute")

    @property
    def parameters(self) -> dict[str, Any]:
        """The same as submitit's parameters."""
        chosen = {
            "nodes": self.nodes,
            "ntasks_per_node": max(1, self.gpus),
            "gpus_per_node": self.gpus or None,
            "cpus_per_task": self.cpus,
            "time": round(60 * self.hours),
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "mem": None if self.mem_gb is None else f"{round(1024 * self.mem_gb)}MB",
            "setup": list(self.setup) or None,
            "signal_delay_s": self.warning_s,
            "srun_args": ["--kill-on-bad-exit=1"],  # else the others wait for a dead one
            "additional_parameters": {"requeue": True},
        }
        return {name: value for name, value in chosen.items() if value is not None}


def launch_slurm(arguments: Sequence[str], train: TrainConfig, slurm: SlurmConfig) -> str:
    """Send ``rocket-fast train ARGUMENTS``, which is ``train``, to SLURM; what to tell the person.

    A dry run writes ``dry-run.sh`` and gives the script. ``Failed`` where there is no SLURM, or it refuses.
    """
    folder = (train.folder / "slurm" if slurm.folder is None else slurm.folder).absolute()
    _require_divisible(train, slurm.nodes * max(1, slurm.gpus))
    submitit = optional_import("submitit", "slurm")
    if not slurm.dry_run and None in (shutil.which("sbatch"), shutil.which("srun")):
        raise Failed(
            "sbatch and srun are not to be found: run this where SLURM is, or with --dry-run to see the script"
        )

    class Executor(submitit.SlurmExecutor):  # type: ignore[name-defined]
        """submitit's, which looks for srun as soon as it is made: a dry run has no need of it."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = Executor(folder=folder, max_num_timeout=slurm.requeues)
    executor.update_parameters(job_name=train.name, **slurm.parameters)
    if slurm.dry_run:
        script = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
        write_atomically(folder / "dry-run.sh", lambda temporary: temporary.write_text(script))
        return script
    folder.mkdir(parents=True, exist_ok=True)
    try:
        job = executor.submit(TrainJob(tuple(arguments)))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise Failed(f"SLURM did not take the job: {' '.join(str(error).split())}") from error
    return f"job {job.job_id}: {train.name} on {slurm.nodes} x {max(1, slurm.gpus)} processes; logs {job.paths.stdout}"


@dataclass(frozen=True)
class TrainJob:
    """What each task of the job runs; pickled by submitit."""

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Join the other tasks and train; when the time is up, put the job back into the queue."""
        submitit = optional_import("submitit", "slurm")
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's, which the main task puts the job back with
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        from rocket_fast.__main__ import INTERRUPTED, main

        status = main(["train", *self.arguments])
        if status == INTERRUPTED + signal.SIGUSR2 and callable(requeue):
            requeue(signal.SIGUSR2, None)
        elif status > INTERRUPTED:
            print("saved and stopped; not put back into the queue from here", file=sys.stderr, flush=True)
        elif status:
            raise RuntimeError(f"rocket-fast train ended with status {status}; what it said is above")

    def checkpoint(self) -> Any:
        """What to run after the job was put back: the same, which continues from the last checkpoint."""
        return optional_import("submitit", "slurm").helpers.DelayedSubmission(self)
