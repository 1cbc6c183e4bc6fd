"""Ranks on CPU that start in milliseconds: forked from one process that has the libraries loaded.

Loading them takes each process seven CPU seconds, which on a small machine is most of a short run. The process that is
forked (Python's forkserver) has neither threads nor process groups, so that what makes forked gloo processes hang is
not there. CUDA does not survive a fork: with GPUs every rank is a process of its own from the start.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import Any

LOADED = "megatron_mixcpt.runtime.loaded"
GPU_FILES = ("nvidia*", "nvhost*", "dxg", "kfd")  # in /dev: NVIDIA's, its boards', those of Windows' Linux, AMD's


def can_fork(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether ranks run on CPU for certain: they are told to, or this machine has no GPU."""
    asked = environment.get("MIXCPT_DEVICE", "").lower()
    return asked == "cpu" or (asked == "" and not any(any(devices.glob(name)) for name in GPU_FILES))


def start_tracker() -> None:
    """Start multiprocessing's resource tracker, which takes the block off signals when it is started: call this before
    they are blocked for what is started next."""
    resource_tracker.ensure_running()


class ForkedRank:
    """`python -m PROGRAM ARGUMENTS`, with what the launcher uses of a subprocess.Popen."""

    def __init__(self, program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([LOADED])
        # With the mask of signals that this process has now, which the ranks then have from their first moment.
        forkserver.ensure_running()
        # The streams go along: those of the process that is forked are the ones that the first rank found.
        self._process = context.Process(
            target=_run, args=(program, list(arguments), dict(environment), _Stream(1), _Stream(2)), name=program
        )
        with _no_main():
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """The new process is PROGRAM, and need not import what this one was started with."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class _Stream:
    """A file descriptor of this process, which arrives in a new one as a descriptor there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (DupFd(self.number),)


def _arrived(descriptor: Any) -> int:
    return descriptor.detach()


def _run(program: str, arguments: Sequence[str], environment: Mapping[str, str], out: int, err: int) -> None:
    """In the new process: be what `python -m` would have started."""
    os.setsid()  # a group of its own, as the other ranks have
    gc.freeze()  # what was loaded stays: looking through it takes each collection of garbage half a second
    for number, stream in ((1, out), (2, err)):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    threads = environment["OMP_NUM_THREADS"]
    if "torch" in sys.modules and threads.isdecimal():
        sys.modules["torch"].set_num_threads(int(threads))
    sys.argv[1:] = arguments
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
