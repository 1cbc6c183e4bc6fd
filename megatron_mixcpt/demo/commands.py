"""Runs the real `mixcpt` commands as a user would, their output in a log file, their progress in ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mixcpt.demo.stages import Progress
from megatron_mixcpt.errors import MixcptError

POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # for a command that was asked to stop: it may be saving a checkpoint
TAIL_LINES = 15


def run_mixcpt(arguments: Sequence[str], log: Path, *, threads: int, poll: Callable[[], None] | None = None) -> None:
    """`mixcpt ARGUMENTS` with this interpreter; stdout and stderr are appended to `log`, `poll` is called meanwhile.

    If this process is interrupted, the command is asked to stop and waited for. Raises MixcptError with the end of the
    log if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # On the CPU, as the demo says, also where there is a GPU.
    environment = {"MIXCPT_DEVICE": "cpu"} | os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    shown = "mixcpt " + " ".join(arguments)
    with log.open("a") as output:
        output.write(f"\n$ {shown}\n")
        output.flush()
        command = [sys.executable, "-m", "megatron_mixcpt.cli", *arguments]
        # A session of its own: the terminal's ^C reaches it once, through us.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while True:
                try:
                    process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if poll:
                        poll()
        finally:
            _stop(process)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise MixcptError(f"`{shown}` ended with exit code {process.returncode}; the end of {log}:\n{tail}")


def training_progress(run_dir: Path, steps: int, progress: Progress) -> Callable[[], None]:
    """A `poll` that reads the newest step from the run's metrics.jsonl."""
    metrics = run_dir / "metrics.jsonl"

    def poll() -> None:
        try:
            last = json.loads(metrics.read_text().splitlines()[-1])
        except (FileNotFoundError, IndexError, json.JSONDecodeError):  # not yet begun, or a line half written
            return
        detail = f"step {last['step']}/{steps}"
        if "train/loss" in last:
            detail += f", loss {last['train/loss']:.2f}"
        progress(last["step"] / steps, detail)

    return poll


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
