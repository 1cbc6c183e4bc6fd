"""average.json, and a page with its Markdown: base, averages and tuned model side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_mixcpt.evaluate.comparison import CHANGES, Measured, add_measurements, change
from megatron_mixcpt.evaluate.stored import rows_of
from megatron_mixcpt.files import write_json
from megatron_mixcpt.report.figures import Series, legend, line_chart
from megatron_mixcpt.report.page import Figure, Page, Table

CURVES = {"domain_gain": "learned", "general_forgetting": "forgotten"}


def write_averages(
    out: Path, measured: Mapping[str, Measured], paths: Mapping[str, str], *, complete: bool = True
) -> None:
    """Write `average.json`, `average.html` and `average.md` into `out`.

    Args:
        measured: what `measure.measure_model` returned, by the name of the column (`base`, alphas, `tuned`).
        complete: False while there is more to come.
    """
    changes = {name: change({"model": parts, "base": measured["base"]}) for name, parts in measured.items()}
    content = {
        name: {"path": paths[name], "change": changes[name], **rows_of(parts)} for name, parts in measured.items()
    }
    write_json(out / "average.json", content)
    cut = "" if complete else " Not complete: it is being measured, or was interrupted."
    page = Page(
        "Weight averages",
        f"Weights (1 - alpha) base + alpha tuned; base: {paths['base']}, tuned: {paths['tuned']}.{cut}",
    )
    known = [name for name in CHANGES if any(name in those for those in changes.values())]
    if known:
        rows = [[CHANGES[name][0], *(_told(name, those.get(name)) for those in changes.values())] for name in known]
        page.section("Learned and forgotten, against the base", Table(["change", *changes], rows))
    add_measurements(page, measured, figures=_curves(changes))
    page.write(out / "average.html")


def _told(name: str, value: float | None) -> str | None:
    return None if value is None else CHANGES[name][1].format(round(value, 4) + 0.0)  # no -0.0000


def _curves(changes: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    """The trade over alpha: base at 0, tuned at 1."""
    ends = {"base": 0.0, "tuned": 1.0}
    places = sorted((float(ends.get(name, name)), name) for name in changes)
    series = [
        Series(text, [(alpha, changes[name].get(part)) for alpha, name in places], colour)
        for colour, (part, text) in enumerate(CURVES.items())
        if any(part in those for those in changes.values())
    ]
    if len(places) < 2 or not series:
        return []
    chart = line_chart("learned and forgotten by alpha", series, "alpha: share of the tuned model", zero=True)
    return [Figure(chart, "The trade", "nats a token", legend((one.name, one.colour) for one in series))]
