"""Progress of a long stage: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_SECONDS = 5.0


class Progress:
    """Shows bytes done, MB/s, tokens/s and the time left. Use as a context and call `advance`."""

    def __init__(self, name: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._name, self._total, self._done = name, max(1, total_bytes), done_bytes
        self._already, self._tokens = done_bytes, 0
        self._began = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            # No refresh thread: the pool may fork.
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False)
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._done, rate="")
        return self

    def advance(self, num_bytes: int, tokens: int) -> None:
        """Count work that has been done."""
        self._done += num_bytes
        self._tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate(now), refresh=True)
        elif now - self._last >= PLAIN_SECONDS:
            self._last = now
            self._print(now)

    def _rate(self, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        return f"{(self._done - self._already) / seconds / 1e6:.1f} MB/s, {self._tokens / seconds / 1e6:.2f} M tokens/s"

    def _print(self, now: float) -> None:
        new = self._done - self._already
        left = (self._total - self._done) * (now - self._began) / new if new else 0.0
        line = f"{self._name} {self._done / self._total:.0%} {self._rate(now)}, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            seconds = time.monotonic() - self._began
            done = (self._done - self._already) / 1e6
            print(
                f"{self._name} done: {done:.1f} MB in {seconds:.1f} s, {self._rate(time.monotonic())}", file=sys.stderr
            )
