"""The ledger in eval.json and on the page: what was lost and learned of each set of questions, and the questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mixcpt.evaluate import gci
from megatron_mixcpt.evaluate.ledger import Entry, Estimate, Flip, Item, flips, ledger
from megatron_mixcpt.report.figures import bar_chart, legend
from megatron_mixcpt.report.page import Cell, Figure, Page, Table, Text

HEAD = ["questions", "group", "number", "right before", "lost", "learned", "% lost", "% learned", "% change"]
SHOWN = 12  # questions of a set on the page, lost and learned each
LONGEST = 160  # characters of a question or an answer on the page
CAPTION = (
    "Answers that the base model had right and this one has wrong, and the other way round. The shares are those of "
    "all questions, without the changes that guessing among given answers explains, with paired bootstrap intervals of "
    "95 %."
)


def answered(parts: Mapping[str, list]) -> list[Item]:
    """All questions that one model answered, from what `measure_model` returned or has so far."""
    return [*parts.get("items", ()), *gci.items(parts.get("gci_answers", ()))]


def compared(measured: Mapping[str, Mapping[str, list]]) -> tuple[list[Item], list[Item]]:
    """What `base` and `model` answered, of those sets of questions that both were asked so far."""
    base, model = (answered(measured.get(name, {})) for name in ("base", "model"))
    tasks = {item.task for item in base} & {item.task for item in model}
    return [item for item in base if item.task in tasks], [item for item in model if item.task in tasks]


def as_json(measured: Mapping[str, Mapping[str, list]]) -> dict[str, Any]:
    """`entries` for each set of questions and its groups, `flips` by the questions' names; empty without a base."""
    base, model = compared(measured)
    if not base:
        return {}
    changed = [{"task": flip.base.task, "id": flip.base.id, "lost": flip.lost} for flip in flips(base, model)]
    return {"entries": [dataclasses.asdict(entry) for entry in ledger(base, model)], "flips": changed}


def add_ledger(page: Page, measured: Mapping[str, Mapping[str, list]]) -> None:
    """A section with the shares, and one with the questions; nothing where there is no base."""
    base, model = compared(measured)
    if not base:
        return
    entries, changed = ledger(base, model), flips(base, model)
    tasks = [entry for entry in entries if entry.group is None]
    page.section(
        "Answers lost and learned",
        Text(CAPTION),
        Table(
            HEAD,
            [_row(entry, base) for entry in entries],
        ),
        Figure(_chart(tasks), "Answers that changed", "by set of questions", legend([("lost", 0), ("learned", 1)])),
    )
    for entry in tasks:
        of_task = [flip for flip in changed if flip.base.task == entry.task]
        for lost, what in ((True, "lost"), (False, "learned")):
            kind = [flip for flip in of_task if flip.lost == lost]
            if kind:
                page.folded(f"{entry.task}: {len(kind)} {what}", *_questions(kind))


def _row(entry: Entry, base: Sequence[Item]) -> list[Cell]:
    items = [item for item in base if item.task == entry.task and entry.group in (None, item.group)]
    right = sum(item.right for item in items)
    group = "all" if entry.group is None else entry.group
    shares = (_share(estimate) for estimate in (entry.lost, entry.learned))
    numbers = (str(entry.count), str(right), str(entry.num_lost), str(entry.num_learned))
    return [entry.task, group, *numbers, *shares, _share(entry.change, sign="+")]


def _share(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (f"{100 * number + 0.0:{sign}.0f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _chart(tasks: Sequence[Entry]) -> Any:
    counts = {"lost": [entry.num_lost for entry in tasks], "learned": [entry.num_learned for entry in tasks]}
    return bar_chart("answers lost and learned", [entry.task for entry in tasks], counts, "set of questions")


def _questions(kind: Sequence[Flip]) -> list[Text | Table]:
    """Surest first, as they come."""
    head = ["question", "group", "base was sure", "expected", "base said", "now says"]
    rows: list[list[Cell]] = [
        [
            shortened(flip.base.question),
            flip.base.group,
            None if flip.base.sure is None else f"{flip.base.sure:.2f}",
            *map(shortened, (flip.base.expected, flip.base.answer, flip.model.answer)),
        ]
        for flip in kind[:SHOWN]
    ]
    more = f"{len(kind) - SHOWN} more are in eval.json." if len(kind) > SHOWN else ""
    return [Table(head, rows), *[Text(more)] * bool(more)]


def shortened(text: str) -> str | None:
    """The end of it, where the question stands."""
    line = " ".join(text.split())
    return (line if len(line) <= LONGEST else "... " + line[-LONGEST:]) or None
