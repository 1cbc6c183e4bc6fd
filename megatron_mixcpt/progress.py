"""Progress of long work: a bar over the newest line on a terminal, plain lines in a log. Nothing heavy is imported."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO

from megatron_mixcpt.units import duration, number

EVERY = 5.0  # seconds between the lines of a log
REDRAW = 0.1  # seconds between pictures on a terminal
SHORTEST = 1e-9  # seconds; guards a division


class Display:
    """One line that is always the newest: on a terminal below what has been printed, in a log again and again.

    Work does not end because nobody can read of it: what a full disk or a closed terminal does not take is lost.

    Args:
        every: seconds between the lines of a log.
    """

    def __init__(self, file: TextIO | None = None, every: float = EVERY) -> None:
        from rich.console import Console

        self._console = Console(file=file or sys.stderr, highlight=False, soft_wrap=True)
        self._every, self._kept, self._drawn = every, time.monotonic(), 0.0
        self._live: Any = None

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def message(self, text: str = "") -> None:
        """Lines of their own, above the bar."""
        with contextlib.suppress(OSError):
            self._console.print(text, markup=False)

    def show(self, share: float, parts: Sequence[str], *, keep: bool = False) -> None:
        """The newest line.

        Args:
            share: 0 to 1, of the bar.
            parts: of the line, the most important first and the remaining time last.
            keep: it stays, also on a terminal and however short the time since the last line.
        """
        now = time.monotonic()
        if keep or (now - self._kept >= self._every and not self.is_terminal):
            self._kept = now
            self.message(" | ".join(parts))
        if self.is_terminal and (now - self._drawn >= REDRAW or share >= 1):
            self._drawn = now
            with contextlib.suppress(OSError):
                if self._live is None:
                    from rich.live import Live

                    # No thread that redraws: the caller may fork.
                    self._live = Live(console=self._console, auto_refresh=False, transient=True)
                    self._live.start()
                self._live.update(_line(share, parts, self._console.width), refresh=True)

    def close(self) -> None:
        """Take the bar away; what was said stays."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None


class Progress:
    """Work whose amount is known. Use as a context, and call `advance`; shows what is done, rates and the time left.

    Args:
        total, done: amount in all, and before now (resumed work does not count as speed).
        unit: what is counted, in the plural.
        shown: False on ranks that say nothing.
    """

    def __init__(self, title: str, total: float, unit: str, *, done: float = 0, shown: bool = True) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = self._before = done
        self._more: Counter[str] = Counter()
        self._began = time.monotonic()
        self._display = Display() if shown else None

    def __enter__(self) -> Progress:
        return self

    def advance(self, amount: float = 1, **more: float) -> None:
        """Count work that has been done, and more of what it can be counted by, as `tokens=512`."""
        self._done += amount
        self._more.update(more)
        if self._display is not None:
            new = self._done - self._before
            left = duration(max(0.0, (self._total - self._done) * self._seconds / new)) if new else "?"
            share = self._done / max(self._total, SHORTEST)
            amounts = f"{number(self._done, 3)} of {_amount(self._total, self._unit)}"
            self._display.show(share, [f"{self._title} {share:.0%}", amounts, *self._rates(), f"ETA {left}"])

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._display is not None:
            self._display.message(text)

    def reach(self, done: float) -> None:
        """So much is done in all."""
        self.advance(done - self._done)

    def skip(self, amount: float) -> None:
        """Count work that was done before."""
        self._done += amount
        self._before += amount

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, SHORTEST)

    def _rates(self) -> list[str]:
        counts = {self._unit: self._done - self._before, **self._more}
        return [f"{_amount(count / self._seconds, unit)}/s" for unit, count in counts.items()]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is None:
            return
        self._display.close()
        if kind is None:
            done = f"{_amount(self._done - self._before, self._unit)} in {duration(self._seconds)}"
            self._display.message(f"{self._title}: {', '.join([done, *self._rates()])}")


def _amount(value: float, unit: str) -> str:
    return f"{number(value, 3)}{'' if unit == 'B' else ' '}{unit}"


def fit(parts: Sequence[str], width: int) -> str:
    """As many parts as fit into a line, the first ones; the last one, which is the time left, always."""
    kept = list(parts)
    while len(kept) > 1 and len(" | ".join(kept)) > width:
        del kept[-2]
    return " | ".join(kept)[-max(1, width) :]


def _line(share: float, parts: Sequence[str], width: int) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bar = 0 if width < 60 else 12 if width < 120 else 24
    grid = Table.grid(padding=(0, 1))
    text = Text(fit(parts, width - 1 - (bar and bar + 1)), no_wrap=True)
    cells = [ProgressBar(total=1.0, completed=share, width=bar)] if bar else []
    grid.add_row(*cells, text)
    return grid
