"""eval.json for programs and eval.md for people: a model's measurements beside those of the model it started from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixcpt.convert.card import not_measured
from megatron_mixcpt.evaluate.gci import GciScore
from megatron_mixcpt.evaluate.harness import TaskScore
from megatron_mixcpt.evaluate.held_out import SourcePerplexity
from megatron_mixcpt.files import write_json, write_whole

Measured = Mapping[str, list]  # "sources": [SourcePerplexity], "tasks": [TaskScore], perhaps "gci": [GciScore]


def change(measured: Mapping[str, Measured]) -> dict[str, float]:
    """What was gained and what was forgotten, from measurements of `model` and `base`.

    `domain_gain`: fall of the mean loss (nats a token) over the domain sources; `general_forgetting`: its rise over all
    other sources; `task_change`: mean change of the tasks' accuracy. Only what can be told is there.
    """
    if "base" not in measured:
        return {}
    before = {source.name: source.value for source in measured["base"]["sources"]}
    rise: dict[bool, list[float]] = {True: [], False: []}
    for source in measured["model"]["sources"]:
        rise[source.kind == "domain"].append(math.log(source.value / before[source.name]))
    result = {}
    if rise[True]:
        result["domain_gain"] = -sum(rise[True]) / len(rise[True])
    if rise[False]:
        result["general_forgetting"] = sum(rise[False]) / len(rise[False])
    scores = {(score.task, score.metric): score.value for score in measured["base"]["tasks"]}
    changes = [
        score.value - scores[score.task, score.metric] for score in measured["model"]["tasks"] if score.metric == "acc"
    ]
    if changes:
        result["task_change"] = sum(changes) / len(changes)
    return result


def write_comparison(
    out: Path, measured: Mapping[str, Measured], *, model: str, base: str | None, unmeasured: Sequence[str] = ()
) -> None:
    """Write `eval.json` and `eval.md` into `out`; `measured` has the keys `model` and, with a base, `base`.

    Args:
        unmeasured: sources of the mixture without a perplexity.
    """
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"model": {"path": model}, "base": {"path": base}, "change": change(measured)}
    content["unmeasured"] = list(unmeasured)
    for name, parts in measured.items():
        for part, rows in parts.items():
            content[name][part] = [dataclasses.asdict(row) for row in rows]
    write_json(out / "eval.json", content)
    write_whole(out / "eval.md", _markdown(measured, model, base, unmeasured))


def _markdown(measured: Mapping[str, Measured], model: str, base: str | None, unmeasured: Sequence[str]) -> str:
    lines = [f"# {model}", ""]
    lines += [f"Compared with {base}." if base else "No base model was given: figures stand alone.", ""]
    lines += _summary(change(measured))
    if measured["model"]["sources"]:
        lines += ["## Perplexity of held-out text (lower is better)", ""]
        lines += _table("source | kind", measured, "sources", _source_row)
        lines += not_measured(unmeasured)
    if measured["model"].get("gci"):
        lines += ["## A domain fact and a general skill in one answer (GCI), share right with 95 % interval", ""]
        lines += gci_table({name: measured[name]["gci"] for name in ("base", "model") if name in measured})
    if measured["model"]["tasks"]:
        lines += ["## Tasks", "", *_table("task | metric", measured, "tasks", _task_row)]
    return "\n".join(lines)


def _summary(changes: Mapping[str, float]) -> list[str]:
    told = {
        "domain_gain": "domain gain (fall of the loss on domain sources): {:+.4f} nats a token",
        "general_forgetting": "general forgetting (rise of the loss on all other sources): {:+.4f} nats a token",
        "task_change": "tasks: accuracy changed by {:+.1%} on average",
    }
    return [f"- {text.format(changes[name])}" for name, text in told.items() if name in changes] + [""] * bool(changes)


def _table(key: str, measured: Mapping[str, Measured], part: str, row: Any) -> list[str]:
    compared = "base" in measured
    header = f"| {key} |" + (" base | model | change |" if compared else " model |")
    rule = "| --- | --- |" + " ---: |" * (3 if compared else 1)
    before = {row(entry)[0]: row(entry)[1] for entry in measured["base"][part]} if compared else {}
    rows = []
    for entry in measured["model"][part]:
        name, value = row(entry)
        cells = (
            [f"{before[name]:.4g}", f"{value:.4g}", _change(part, before[name], value)]
            if compared
            else [f"{value:.4g}"]
        )
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return [header, rule, *rows, ""]


def gci_table(columns: Mapping[str, list[GciScore]]) -> list[str]:
    """One column a model, one row a skill and score."""
    first = next(iter(columns.values()))
    lines = [f"| skill | score | questions | {' | '.join(columns)} |", "| --- | --- | ---: |" + " --- |" * len(columns)]
    for row, entry in enumerate(first):
        cells = [f"{s[row].value:.0%} [{s[row].low:.0%}, {s[row].high:.0%}]" for s in columns.values()]
        lines.append(f"| {entry.skill} | {entry.score} | {entry.count} | {' | '.join(cells)} |")
    return [*lines, ""]


def _change(part: str, before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if part == "sources" else f"{after - before:+.4f}"


def _source_row(source: SourcePerplexity) -> tuple[str, float]:
    return f"{source.name} | {source.kind}", source.value


def _task_row(score: TaskScore) -> tuple[str, float]:
    direction = "" if score.higher_is_better else " (lower is better)"
    return f"{score.task} | {score.metric}{direction}", score.value
