"""What a newcomer sees: stages under headings, one overall bar with the remaining time, notes on what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.rule import Rule

PLAIN_INTERVAL = 10.0  # seconds between progress lines where the output is a log


class DemoConsole:
    """Progress over all stages. `expected` maps each stage to its usual seconds; only their ratios matter for long.

    The remaining time is the expected time of what is left, scaled by how much slower or faster than expected this
    machine has been so far.
    """

    def __init__(self, expected: Mapping[str, float], file: TextIO | None = None) -> None:
        self._expected = dict(expected)
        self._done: dict[str, float] = {}  # expected seconds of finished stages; skipped ones tell nothing about pace
        self._skipped: set[str] = set()
        self._stage: str | None = None
        self._share, self._detail = 0.0, ""
        self._start = self._stage_start = time.monotonic()
        self._last_line = 0.0
        self._console = Console(file=file or sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]overall"), BarColumn(bar_width=30), TaskProgressColumn(),
                TextColumn("{task.description}"), console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()

    def say(self, text: str = "") -> None:
        """Lines of plain text."""
        self._console.print(text, markup=False)

    def heading(self, title: str) -> None:
        """The beginning of a part of the demo."""
        self._console.print()
        self._console.print(Rule(f"[bold]{title}", align="left") if self._console.is_terminal else f"== {title}")

    def begin(self, name: str, title: str) -> None:
        """Stage `name` (a key of `expected`) starts."""
        self._stage, self._share, self._detail = name, 0.0, ""
        self._stage_start = time.monotonic()
        self.say(f"  {title} ...")
        self._show()

    def progress(self, share: float, detail: str) -> None:
        """The running stage is `share` (0 to 1) done."""
        self._share, self._detail = share, detail
        self._show()

    def end(self) -> None:
        """The running stage is done."""
        assert self._stage is not None
        self._done[self._stage] = self._expected[self._stage]
        self._stage = None
        self.say(f"    done in {duration(time.monotonic() - self._stage_start)}")

    def skipped(self, name: str, title: str) -> None:
        """Stage `name` was finished by an earlier run."""
        self._skipped.add(name)
        self.say(f"  {title}: done before, skipped")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def elapsed(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._start

    def _show(self) -> None:
        running = self._expected[self._stage] * self._share if self._stage else 0.0
        ran = sum(self._done.values()) + running
        total = sum(seconds for name, seconds in self._expected.items() if name not in self._skipped)
        # Until ten expected seconds are done there is too little to judge the machine by.
        pace = self.elapsed / ran if ran > 10.0 else 1.0
        remaining = duration((total - ran) * pace)
        detail = f" | {self._stage}: {self._detail}" if self._detail else f" | {self._stage}"
        if self._bar is not None:
            self._bar.update(self._task, completed=ran / total, description=f"ETA {remaining}{detail}")
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            self.say(f"    [overall {ran / total:4.0%} | ETA {remaining}{detail}]")


def duration(seconds: float) -> str:
    """`4m05s` or `12s`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
