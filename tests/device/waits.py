"""The waits of a step: those that docs/gpu.md lists, and whether a run had these and no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.device.residency import Residency
from tests.device.runs import STEP

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
HEADING = "## Waits of a step"
ALWAYS = "always"


@dataclass(frozen=True)
class Row:
    """Of the page's table: what waits, where, for whom (`always`, or a feature), and how often."""

    where: str
    how: str
    when: str
    often: str


def documented(page: Path = PAGE) -> list[Row]:
    """The table under HEADING; raises ValueError where it has no rows."""
    section = page.read_text().split(f"{HEADING}\n", 1)[1].split("\n## ", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "`" in line[:4]]
    rows = [Row(where.strip("`"), *rest) for where, *rest, _ in cells]
    if not rows:
        raise ValueError(f"{page}: no table under {HEADING!r}")
    return rows


def undocumented(residency: Residency, features: Iterable[str], *, steps: int, micro_batches: int) -> list[str]:
    """What the steps of a run waited for beyond what the page lists for its features, with the stacks, and what the
    page lists although nothing waited: empty where the page is right."""
    waits = [wait for wait in residency.waits if wait.phase == STEP]
    found = Counter((wait.where, wait.how) for wait in waits)
    stacks = {(wait.where, wait.how): wait.told() for wait in waits}
    rows = {(row.where, row.how): row for row in documented() if row.when in (ALWAYS, *features)}
    times = {"step": steps, "micro-batch": steps * micro_batches}
    problems = [f"not in {PAGE.name}: {stacks[key]}" for key in found if key not in rows]
    for key, row in rows.items():
        if not found[key]:
            problems.append(f"in {PAGE.name}, but nothing waited: {row}")
        elif row.often in times and found[key] != times[row.often]:
            problems.append(f"{found[key]} times in {steps} steps of {micro_batches} micro-batches: {stacks[key]}")
    return problems
