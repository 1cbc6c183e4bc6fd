"""Jobs and their submission: one job of a name at a time."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mixcpt.errors import ConfigError, MixcptError
from megatron_mixcpt.files import check_writable, write_whole


@dataclass(frozen=True)
class Job:
    """One sbatch call."""

    stage: str
    name: str
    """SLURM's; see job_name."""
    script: str
    folder: Path
    logs: Path
    """Folder of the batch script's log and of the ranks'."""
    command: str
    """What it runs, as it was asked for."""
    size: str
    """Nodes, GPUs and ranks, in words."""
    time: str
    """Its limit."""
    is_array: bool = False
    files: dict[Path, str] = field(default_factory=dict)
    """Written before the job is submitted."""

    @property
    def path(self) -> Path:
        """Where the script goes."""
        return self.folder / f"{self.stage}.sbatch"


def job_name(stage: str, folder: Path) -> str:
    """Of a stage that works in `folder`, the same whenever it is submitted; no other folder's stage has it.

    Without spaces and commas, which sbatch and squeue would cut it at.
    """
    path = folder.resolve()
    readable = re.sub(r"[^\w.-]", "_", f"{stage}-{path.name}")
    return f"mixcpt-{readable}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def refuse_queued(jobs: list[Job]) -> None:
    """Raise ConfigError where one of the jobs is in the queue already; nothing is submitted then."""
    if shutil.which("sbatch") is None:
        raise MixcptError("there is no sbatch here: run this on a SLURM cluster's login node, or look with --dry-run")
    names = ",".join(job.name for job in jobs)
    queued = _call("squeue", "--noheader", "--me", f"--name={names}", "--format=%F %T %j").splitlines()
    if queued:
        number, state, name = queued[0].split()
        raise ConfigError(
            f"job {number} ({name}) is {state.lower()} already and does the same: wait for it, or scancel {number}"
        )


def sbatch_command(job: Job, after: str | None) -> list[str]:
    """The call that submits a job; arguments as in `submit`."""
    conditions = [f"afterok:{after}"] if after else []
    if not job.is_array:  # whose tasks share their name
        conditions.append("singleton")
    dependency = [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"] if conditions else []
    return ["sbatch", "--parsable", *dependency, str(job.path)]


def submit(job: Job, after: str | None) -> str:
    """Submit a job whose files are there; returns its number.

    Args:
        after: number of a job that must end well before this one starts; if it does not, this one is cancelled.
    """
    shown = _call(*sbatch_command(job, after))
    match = re.match(r"\d+", shown)
    if not match:
        raise MixcptError(f"sbatch answered {shown!r} in place of a job number")
    return match[0]


def submit_all(jobs: list[Job]) -> Iterator[tuple[Job, str]]:
    """Write the jobs' files, then submit them, each after the one before; yields them with their numbers. If one is
    refused, none stays."""
    for job in jobs:
        for folder in (job.folder, job.logs):
            check_writable(folder)
        for path, text in {**job.files, job.path: job.script}.items():
            write_whole(path, text)
    numbers: list[str] = []
    try:
        for job in jobs:
            numbers.append(submit(job, numbers[-1] if numbers else None))
            yield job, numbers[-1]
    except (MixcptError, KeyboardInterrupt):
        if numbers:
            _call("scancel", *numbers)
        raise


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MixcptError(f"{command[0]} refused: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
