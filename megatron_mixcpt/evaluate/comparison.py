"""What was measured of several models side by side: eval.json for programs, a page and its Markdown for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixcpt.convert.card import not_measured
from megatron_mixcpt.evaluate import ledger_report
from megatron_mixcpt.evaluate.gci import GciScore
from megatron_mixcpt.evaluate.harness import TaskScore
from megatron_mixcpt.evaluate.stored import rows_of
from megatron_mixcpt.files import write_json
from megatron_mixcpt.report.figures import bar_chart, legend
from megatron_mixcpt.report.page import Cell, Figure, Page, Table, Text

Measured = Mapping[str, list]
"""`sources`: [SourcePerplexity], `tasks`: [TaskScore], perhaps `gci`: [GciScore]; parts that are not measured yet are
empty or missing."""

CHANGES = {
    "domain_gain": ("learned: fall of the loss on domain sources, nats a token", "{:+.4f}"),
    "general_forgetting": ("forgotten: largest rise of the loss on any other source, nats a token", "{:+.4f}"),
    "task_change": ("tasks: mean change of the accuracy", "{:+.1%}"),
}


def change(measured: Mapping[str, Measured]) -> dict[str, float]:
    """What was gained and what was forgotten, from measurements of `model` and `base`.

    `domain_gain`: fall of the mean loss (nats a token) over the domain sources; `general_forgetting`: the largest rise
    among all other sources, for one that was trained on and fell must not hide one that was lost (as `forget.budget`
    counts); `task_change`: mean change of the tasks' accuracy. Only what can be told is there.
    """
    if "base" not in measured or "model" not in measured:
        return {}
    before = {source.name: source.value for source in measured["base"].get("sources", ())}
    rise: dict[bool, list[float]] = {True: [], False: []}
    for source in measured["model"].get("sources", ()):
        if source.name in before:
            rise[source.kind == "domain"].append(math.log(source.value / before[source.name]))
    result = {}
    if rise[True]:
        result["domain_gain"] = -sum(rise[True]) / len(rise[True])
    if rise[False]:
        result["general_forgetting"] = max(rise[False])
    scores = {(score.task, score.metric): score.value for score in measured["base"].get("tasks", ())}
    changes = [
        score.value - scores[score.task, score.metric]
        for score in measured["model"].get("tasks", ())
        if score.metric == "acc" and (score.task, score.metric) in scores
    ]
    if changes:
        result["task_change"] = sum(changes) / len(changes)
    return result


def write_comparison(
    out: Path,
    measured: Mapping[str, Measured],
    *,
    model: str,
    base: str | None,
    unmeasured: Sequence[str] = (),
    complete: bool = True,
) -> None:
    """Write `eval.json`, `eval.html` and `eval.md` into `out`.

    Args:
        measured: has the keys `model` and, with a base, `base`.
        unmeasured: sources of the mixture without a perplexity.
        complete: False while there is more to come.
    """
    content: dict[str, Any] = {"complete": complete, "model": {"path": model}, "base": {"path": base}}
    content |= {"change": change(measured), "unmeasured": list(unmeasured), "ledger": ledger_report.as_json(measured)}
    for name, parts in measured.items():
        content[name] |= rows_of(parts)
    write_json(out / "eval.json", content)
    against = f"Compared with {base}." if base else "No base model was given: figures stand alone."
    cut = "" if complete else " Not complete: it is being measured, or was interrupted."
    page = Page(Path(model).name or model, f"{model}. {against}{cut}")
    changes = change(measured)
    page.section("", *[Table(["change", "since the base"], told(changes))] * bool(changes))
    add_measurements(page, {name: measured[name] for name in ("base", "model") if name in measured}, unmeasured)
    ledger_report.add_ledger(page, measured)
    page.write(out / "eval.html")


def told(changes: Mapping[str, float]) -> list[list[Cell]]:
    """The changes in words, a row each."""
    return [[text, form.format(changes[name])] for name, (text, form) in CHANGES.items() if name in changes]


def add_measurements(
    page: Page, columns: Mapping[str, Measured], unmeasured: Sequence[str] = (), figures: Sequence[Figure] = ()
) -> None:
    """Figures, after those given, and tables of perplexity, GCI and tasks: a column a model, and how the second
    changed where there are `base` and `model`."""
    sources = _table(
        ["source", "kind"],
        columns,
        "sources",
        lambda entry: (entry.name, entry.kind),
        lambda before, after: f"{after / before - 1:+.1%}",
    )
    scored = {name: parts["gci"] for name, parts in columns.items() if parts.get("gci")}
    tasks = _table(["task", "metric"], columns, "tasks", _task_key, lambda before, after: f"{after - before:+.4f}")
    page.figures("", [*figures, *_losses(columns, [str(row[0]) for row in sources.rows]), *_both_right(scored)])
    if sources.rows:
        notes = (Text(line) for line in not_measured(unmeasured) if line)
        page.section("Perplexity of held-out text (lower is better)", *notes, sources)
    if scored:
        title = "A domain fact and a general skill in one answer (GCI), share right with 95 % interval"
        page.section(title, _gci_table(scored))
    if tasks.rows:
        page.section("Tasks", tasks)


def _losses(columns: Mapping[str, Measured], sources: list[str]) -> list[Figure]:
    losses = {
        name: [math.log(entry.value) for entry in parts["sources"]]
        for name, parts in columns.items()
        if len(parts.get("sources", ())) == len(sources)
    }
    if not sources or any(loss < 0 for values in losses.values() for loss in values):
        return []
    chart = bar_chart("loss of held-out text, by source", sources, losses)
    return [Figure(chart, "Loss of held-out text", "nats a token", _legend(losses))]


def _both_right(columns: Mapping[str, list[GciScore]]) -> list[Figure]:
    if not columns:
        return []
    both = {name: [entry for entry in scores if entry.score == "both"] for name, scores in columns.items()}
    skills = [entry.skill for entry in next(iter(both.values()))]
    shares = {name: [100 * entry.value for entry in scores] for name, scores in both.items()}
    chart = bar_chart("fact and skill both right, by skill", skills, shares, unit=" %")
    return [Figure(chart, "Fact and skill both right", "share of the answers, by skill", _legend(columns))]


def _table(
    head: list[str],
    columns: Mapping[str, Measured],
    part: str,
    key: Callable[[Any], tuple[str, ...]],
    changed: Callable[[float, float], str],
) -> Table:
    found = {name: {key(entry): entry.value for entry in parts.get(part, ())} for name, parts in columns.items()}
    compared = list(found) == ["base", "model"]
    rows: list[list[Cell]] = []
    for cells in dict.fromkeys(key for values in found.values() for key in values):
        values = [column.get(cells) for column in found.values()]
        row: list[Cell] = [*cells, *(None if value is None else f"{value:.4g}" for value in values)]
        if compared:
            before, after = values
            row.append(None if before is None or after is None else changed(before, after))
        rows.append(row)
    return Table([*head, *found, *["change"] * compared], rows)


def _task_key(score: TaskScore) -> tuple[str, str]:
    return score.task, score.metric + ("" if score.higher_is_better else " (lower is better)")


def _gci_table(columns: Mapping[str, list[GciScore]]) -> Table:
    rows: list[list[Cell]] = []
    for row, entry in enumerate(next(iter(columns.values()))):
        cells = [f"{s[row].value:.0%} [{s[row].low:.0%}, {s[row].high:.0%}]" for s in columns.values()]
        rows.append([entry.skill, entry.score, str(entry.count), *cells])
    return Table(["skill", "score", "questions", *columns], rows)


def _legend(columns: Mapping[str, Any]) -> str:
    return legend((name, index) for index, name in enumerate(columns))
