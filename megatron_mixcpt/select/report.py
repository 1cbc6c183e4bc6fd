"""report.md of a selection: how the scores are distributed, and what stands at both ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.charts import bar_chart

SHOWN = ("ppl_plain", "ppl_chat", "fas", "tokens")
BINS = 12
EXTREMES = 5
CHARACTERS = 200


def write_report(
    out: Path,
    config: Any,
    table: dict[str, np.ndarray],
    texts: list[tuple[str, str]],
    ranked: np.ndarray,
    chosen: dict[str, np.ndarray],
    mixes: dict[str, Path],
) -> None:
    """Write `report.md` and its charts `report_<column>.svg`. `ranked` goes from the best row to the worst."""
    settings = config.select
    lines = [
        f"# Selection by `{settings.by}`" + (f", {settings.order} end" if settings.by != "random" else ""),
        "",
        f"Model `{config.model.source}`, records of `{config.data.mix}`. NLL in nats a token of the response's text; "
        "FAS = NLL after the chat template / NLL after the plain prompt.",
        "",
        "| source | kind | scored | chosen | median ppl_plain | median ppl_chat | median FAS |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in np.unique(table["source"]):
        rows = table["source"] == name
        medians = " | ".join(_number(_median(table[column][rows])) for column in ("ppl_plain", "ppl_chat", "fas"))
        kind = table["kind"][rows][0]
        lines.append(f"| {name} | {kind} | {rows.sum()} | {(table['picked'] & rows).sum()} | {medians} |")
    lines += ["", *(f"- {name}: `{path}`" for name, path in mixes.items()), "", "## Distributions", ""]
    for column in SHOWN:
        values = table[column].astype(np.float64)
        if np.isfinite(values).any():
            (out / f"report_{column}.svg").write_text(_histogram(column, values, table["picked"]))
            lines.append(f"![{column}](report_{column}.svg)")
    for kind, rows in chosen.items():
        if len(rows):
            left = ranked[(table["kind"][ranked] == kind) & ~table["picked"][ranked]]
            lines += ["", f"## Ends of the {kind} records", ""]
            for title, some in (
                ("first chosen", rows[:EXTREMES]),
                ("last chosen", rows[-EXTREMES:]),
                ("worst", left[::-1][:EXTREMES]),
            ):
                if len(some):
                    lines += [f"### {title}", "", *_examples(table, texts, some, settings.column or "ppl_plain"), ""]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def _examples(table: dict[str, np.ndarray], texts: list[tuple[str, str]], rows: np.ndarray, column: str) -> list[str]:
    lines = [f"| place | {column} | prompt | response |", "|---|---:|---|---|"]
    for row in rows.tolist():
        prompt, response = (_cell(text) for text in texts[row])
        lines.append(
            f"| {table['file'][row]}:{table['line'][row]} | {_number(table[column][row])} | {prompt} | {response} |"
        )
    return lines


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= CHARACTERS else flat[: CHARACTERS - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else ""


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _histogram(column: str, values: np.ndarray, picked: np.ndarray) -> str:
    known = np.isfinite(values)
    # The last bin holds the long tail.
    edges = np.linspace(values[known].min(), np.quantile(values[known], 0.98) + 1e-9, BINS)
    place = np.clip(np.searchsorted(edges, values[known], side="right") - 1, 0, BINS - 1)
    counts = {
        name: np.bincount(place[mask[known]], minlength=BINS).tolist()
        for name, mask in (("left", ~picked), ("chosen", picked))
    }
    return bar_chart(column, [f"{edge:.3g}" for edge in edges], counts)
