"""How far a study is: what is done, what failed, what the rule chose, what comes next."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

from megatron_mixcpt.study.cells import Cell, Cells
from megatron_mixcpt.study.outcome import Choice, Outcome, chosen

FAILED = "failed.json"


@dataclass
class Standing:
    """A study as its folder shows it now."""

    cells: Cells
    runs: list[Cell] = field(default_factory=list)
    """In the study so far, by arm; the second stage of an arm joins when its learning rate is chosen."""
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows by the run's folder and alpha; empty before the base is measured."""
    outcomes: dict[str, dict[float, Outcome]] = field(default_factory=dict)
    """By the run's folder and alpha."""
    failed: dict[str, str] = field(default_factory=dict)
    """Reason by the run's folder."""
    chosen: dict[str, Choice] = field(default_factory=dict)
    """By arm."""

    @property
    def open(self) -> list[Cell]:
        """Runs that are neither measured nor failed."""
        return [c for c in self.runs if c.folder.name not in self.failed and self.cells.missing(c)]

    @property
    def num_ended(self) -> int:
        return len(self.runs) - len(self.open)

    def of(self, cell: Cell, alpha: float = 1.0) -> Outcome | None:
        """What a run, or its average with the base, learned and forgot; None where it is not measured."""
        return self.outcomes.get(cell.folder.name, {}).get(alpha)


def standing(cells: Cells) -> Standing:
    """Read the folder of a study."""
    now = Standing(cells)
    base = cells.base_measured
    for arm in cells.study.arms:
        sweep = cells.sweep(arm)
        _add(now, sweep, base)
        ended = base and all(cell.folder.name in now.failed or not cells.missing(cell) for cell in sweep)
        models = [(cell, alpha) for cell in sweep for alpha in (1.0, *cells.study.average)]
        found = {(cell.lr, alpha): one for cell, alpha in models if (one := now.of(cell, alpha)) is not None}
        choice = chosen(cells.study.choose, found)
        if ended and choice is not None:
            now.chosen[arm] = choice
            _add(now, cells.repeats(arm, choice.lr), base)
    return now


def _add(now: Standing, runs: list[Cell], base: dict) -> None:
    for cell in runs:
        now.runs.append(cell)
        name = cell.folder.name
        if base:
            now.measured[name] = now.cells.measured(cell)
            now.outcomes[name] = now.cells.outcomes(cell)
        if now.cells.missing(cell):
            with contextlib.suppress(FileNotFoundError):  # a worker that starts removes it, to try again
                now.failed[name] = json.loads((cell.folder / FAILED).read_text())["reason"]
