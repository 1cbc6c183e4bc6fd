"""average.json and average.md: base, averages and tuned model side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mixcpt.evaluate.comparison import change, gci_table
from megatron_mixcpt.files import write_json, write_whole

CHANGES = {
    "domain_gain": "domain gain, nats a token",
    "general_forgetting": "general forgetting, nats a token",
    "task_change": "mean change of the tasks' accuracy",
}


def write_averages(out: Path, measured: Mapping[str, Mapping[str, list]], paths: Mapping[str, str]) -> None:
    """`measured`: what `measurements.measure_model` returned, by the name of the column (`base`, alphas, `tuned`)."""
    changes = {name: change({"model": parts, "base": measured["base"]}) for name, parts in measured.items()}
    content: dict[str, Any] = {
        name: {
            "path": paths[name],
            "change": changes[name],
            **{part: [dataclasses.asdict(row) for row in rows] for part, rows in parts.items()},
        }
        for name, parts in measured.items()
    }
    write_json(out / "average.json", content)
    write_whole(out / "average.md", _markdown(measured, changes, paths))


def _markdown(
    measured: Mapping[str, Mapping[str, list]], changes: Mapping[str, Mapping[str, float]], paths: Mapping[str, str]
) -> str:
    base = measured["base"]
    lines = ["# Weight averages", "", "Weights (1 - alpha) base + alpha tuned.", ""]
    lines += [f"- base: {paths['base']}", f"- tuned: {paths['tuned']}", ""]
    rows = [
        (text, [f"{round(change[key], 4) + 0.0:+.4f}" for change in changes.values()])  # no -0.0000
        for key, text in CHANGES.items()
        if key in changes["tuned"]
    ]
    for row, source in enumerate(base["sources"]):
        values = [f"{parts['sources'][row].value:.4g}" for parts in measured.values()]
        rows.append((f"perplexity, {source.name} ({source.kind})", values))
    for row, task in enumerate(base["tasks"]):
        rows.append(
            (f"{task.task}, {task.metric}", [f"{parts['tasks'][row].value:.4f}" for parts in measured.values()])
        )
    lines += [f"| | {' | '.join(measured)} |", "| --- |" + " ---: |" * len(measured)]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows] + [""]
    if base.get("gci"):
        lines += ["## A domain fact and a general skill in one answer (GCI)", ""]
        lines += gci_table({name: parts["gci"] for name, parts in measured.items()})
    return "\n".join(lines)
