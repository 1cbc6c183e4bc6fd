"""report.html and report.md of a selection: how the scores are distributed, and what stands at both ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.report.figures import bar_chart, legend
from megatron_mixcpt.report.page import Cell, Figure, Page, Table, Text

SHOWN = {
    "ppl_plain": "perplexity of the response after the plain prompt",
    "ppl_chat": "perplexity of the response in the chat template",
    "fas": "NLL after the chat template / NLL after the plain prompt",
    "tokens": "tokens of the response",
}
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
    """Write `report.html` and `report.md`. `ranked` goes from the best row to the worst."""
    settings = config.select
    end = f", {settings.order} end" if settings.by != "random" else ""
    page = Page(f"Selection by {settings.by}{end}", f"{config.model.source}, records of {config.data.mix}")
    page.tiles(
        [
            ("scored", [f"{len(table['kind']):,}"]),
            *((f"{kind} records chosen", [f"{len(rows):,}"]) for kind, rows in chosen.items()),
        ]
    )
    rows: list[list[Cell]] = []
    for name in np.unique(table["source"]):
        its = table["source"] == name
        medians = [_number(_median(table[column][its])) for column in ("ppl_plain", "ppl_chat", "fas")]
        rows.append([name, table["kind"][its][0], str(its.sum()), str((table["picked"] & its).sum()), *medians])
    what = "NLL in nats a token of the response's text; FAS = NLL after the chat template / NLL after the plain prompt."
    head = ["source", "kind", "scored", "chosen", "median ppl_plain", "median ppl_chat", "median FAS"]
    page.section("Sources", Text(what), Table(head, rows), *(Text(f"{name}: {path}") for name, path in mixes.items()))
    numbers = {column: table[column].astype(np.float64) for column in SHOWN}
    shown = [_histogram(name, values, table["picked"]) for name, values in numbers.items() if np.isfinite(values).any()]
    page.figures("Distributions", shown)
    for kind, best in chosen.items():
        if len(best):
            left = ranked[(table["kind"][ranked] == kind) & ~table["picked"][ranked]]
            parts = {"first chosen": best[:EXTREMES], "last chosen": best[-EXTREMES:], "worst": left[::-1][:EXTREMES]}
            column = settings.column or "ppl_plain"
            page.section(
                f"Ends of the {kind} records",
                *(_examples(title, table, texts, some, column) for title, some in parts.items() if len(some)),
            )
    page.write(out / "report.html")


def _examples(
    title: str, table: dict[str, np.ndarray], texts: list[tuple[str, str]], rows: np.ndarray, column: str
) -> Table:
    body: list[list[Cell]] = []
    for row in rows.tolist():
        prompt, response = (_short(text) for text in texts[row])
        body.append([f"{table['file'][row]}:{table['line'][row]}", _number(table[column][row]), prompt, response])
    return Table([title, column, "prompt", "response"], body)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= CHARACTERS else flat[: CHARACTERS - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else ""


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _histogram(column: str, values: np.ndarray, picked: np.ndarray) -> Figure:
    known = np.isfinite(values)
    # The last bin holds the long tail.
    edges = np.linspace(values[known].min(), np.quantile(values[known], 0.98) + 1e-9, BINS)
    place = np.clip(np.searchsorted(edges, values[known], side="right") - 1, 0, BINS - 1)
    counts = {
        name: np.bincount(place[mask[known]], minlength=BINS).tolist()
        for name, mask in (("left", ~picked), ("chosen", picked))
    }
    chart = bar_chart(column, [f"{edge:.3g}" for edge in edges], counts, f"{column}, from")
    return Figure(chart, column, SHOWN[column], legend([("left", 0), ("chosen", 1)]))
