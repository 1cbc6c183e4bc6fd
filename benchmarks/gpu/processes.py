"""A program with a time limit, which takes nothing along: what it started ends with it, its threads' stacks are kept.

The ranks of `mixcpt` have sessions of their own, so that neither a process group nor a session holds all of them. What
a program starts is known by a mark in its environment instead, which children inherit.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "MIXCPT_GPU_PROCESSES"
STACK_SECONDS = 2.0  # to write stacks after SIGABRT
LEAVING_SECONDS = 2.0  # after SIGKILL; a process that waits inside of a driver may never go
ENDING_SECONDS = STACK_SECONDS + LEAVING_SECONDS
DONE, OUT_OF_TIME = "done", "out of time"


@dataclass(frozen=True)
class Ended:
    how: str
    """DONE, OUT_OF_TIME, "exit code N" or "signal N"."""
    seconds: float

    @property
    def well(self) -> bool:
        return self.how == DONE


def run_within(
    seconds: float, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run `command` for so many seconds at most; its output is appended to `log`.

    It has a temporary folder of its own, which goes with it. Whatever happens, also to this process in here, none of
    its descendants stays.
    """
    began = time.monotonic()
    mark = f"{os.environ.get(MARK, '')}/{uuid.uuid4().hex}"
    with log.open("ab") as output, _temporary_folder() as folder:
        surroundings = {**os.environ, **(environment or {}), MARK: mark, "TMPDIR": folder, "PYTHONFAULTHANDLER": "1"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=surroundings,
            start_new_session=True,
        )
        try:
            how = _described(process.wait(timeout=max(seconds, 0.0)))
        except subprocess.TimeoutExpired:
            how = OUT_OF_TIME
            _dump_stacks(mark)
        finally:
            _kill(mark, process)
    return Ended(how, time.monotonic() - began)


def _described(code: int) -> str:
    if code == 0:
        return DONE
    return f"exit code {code}" if code > 0 else f"signal {-code}"


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """Never fails at the end: a process that cannot be killed may write still."""
    with tempfile.TemporaryDirectory(prefix="mixcpt-gpu-", ignore_cleanup_errors=True) as folder:
        yield folder


def _dump_stacks(mark: str) -> None:
    """Python's fault handler answers SIGABRT with the stacks of all threads, also where the main one is in C++."""
    for number in _marked(mark):
        with contextlib.suppress(OSError):
            resource.prlimit(number, resource.RLIMIT_CORE, (0, 0))  # the stacks are enough
            os.kill(number, signal.SIGABRT)
    deadline = time.monotonic() + STACK_SECONDS
    while time.monotonic() < deadline and _marked(mark):
        time.sleep(0.05)


def _kill(mark: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + LEAVING_SECONDS
    while True:
        left = _marked(mark)
        for number in left:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        process.poll()
        if not left or time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _marked(mark: str) -> list[int]:
    """Processes that were started under `mark`, and live."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if any(entry.startswith(wanted) for entry in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found
