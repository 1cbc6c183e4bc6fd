"""Ends a rank that makes no progress, and leaves behind where it stood.

A rank that hangs makes all others wait for it, so the watchdogs of all ranks fire at the same time and every rank's
stacks are written. They run before the process group's own timeout, which would end the waiting ranks only.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

_watching: list[Watchdog] = []

GRACE_SECONDS = 3.0  # between writing the stacks and ending: peers that lose contact could not write theirs


def alive() -> None:
    """What this rank does gets on: for long work that does not know who watches it. Heard by the Watchdog in whose
    context it is called, if any."""
    if _watching:
        _watching[-1].heartbeat()


class Watchdog:
    """Context. `heartbeat(phase)` says that this rank is alive and what it does next.

    Args:
        folder: where `rank_<rank>.txt` is written; made when there is something to write.
        seconds: longest time between two heartbeats, in which the process runs.
    """

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self._path, self._rank, self._seconds = folder / f"rank_{rank:05d}.txt", rank, seconds
        self._phase, self._last = "setup", time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        _watching.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._closed.set()
        _watching.remove(self)
        if isinstance(error, RuntimeError):  # of a collective whose peer is gone, most of all
            self._dump("".join(traceback.format_exception(error)))

    def heartbeat(self, phase: str | None = None) -> None:
        """Progress in what it did before, or in `phase` from now on."""
        self._phase, self._last = phase or self._phase, time.monotonic()

    def _watch(self) -> None:
        pause = min(1.0, self._seconds / 4)
        looked = time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            late = now - looked - pause
            if late > pause:  # the whole process stood still: a suspended job, a closed laptop
                self._last = min(self._last + late, now)
            looked = now
            idle = now - self._last
            if idle <= self._seconds:
                continue
            reason = f"no progress for {idle:.0f} s in {self._phase} (train.timeout_minutes)"
            self._dump(reason)
            print(f"rank {self._rank}: {reason}; stacks in {self._path}", file=sys.stderr, flush=True)
            time.sleep(GRACE_SECONDS)
            os._exit(1)

    def _dump(self, reason: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank}: {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            print(f"rank {self._rank}: {self._path} cannot be written: {error}", file=sys.stderr, flush=True)
