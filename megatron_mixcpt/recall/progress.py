"""Progress of drawing: a bar on a terminal, a plain line every few seconds elsewhere. Rank 0 speaks for all."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_SECONDS = 5.0


class DrawProgress:
    """Use as a context. `total` samples are this rank's share, `done` of them were there before."""

    def __init__(self, total: int, done: int, ranks: int, *, shown: bool) -> None:
        self._total, self._before, self._done, self._tokens = max(1, total), done, done, 0
        self._ranks, self._shown = ranks, shown
        self._began = self._told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> DrawProgress:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("drawing"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._done)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tokens(self, count: int) -> None:
        self._tokens += count
        self._tell(final=False)

    def samples(self, count: int) -> None:
        self._done += count
        self._tell(final=self._done >= self._total)

    def _tell(self, *, final: bool) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._line(now), refresh=True)
        elif self._shown and (final or now - self._told >= PLAIN_SECONDS):
            self._told = now
            print(f"drawing {self._done / self._total:.0%}, {self._line(now)}", file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        """Samples and rates, the other ranks taken to be as fast as this one."""
        seconds = max(now - self._began, 1e-9)
        new = self._done - self._before
        others = f" a rank, {self._ranks} ranks" if self._ranks > 1 else ""
        line = f"{self._done} of {self._total} samples{others}, {self._tokens / seconds:.0f} tokens/s"
        if new:
            line += f", {new / seconds:.2f} samples/s, {(self._total - self._done) * seconds / new:.0f} s left"
        return line
