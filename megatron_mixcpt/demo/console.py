"""What a newcomer sees: stages under headings, one overall bar with the remaining time, notes on what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from megatron_mixcpt.progress import Display
from megatron_mixcpt.units import duration

EVERY = 10.0  # seconds between progress lines in a log


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
        self._display = Display(file or sys.stdout, EVERY)
        self.say, self.close = self._display.message, self._display.close

    def heading(self, title: str) -> None:
        """The beginning of a part of the demo."""
        self.say(f"\n== {title}")

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
        parts = [f"overall {ran / total:.0%}", *([self._stage] if self._stage else []), *filter(None, [self._detail])]
        self._display.show(ran / total, [*parts, f"ETA {duration((total - ran) * pace)}"])
