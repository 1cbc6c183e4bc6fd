"""average.json, and a page with its Markdown: base, averages and tuned model side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mixcpt import __version__
from megatron_mixcpt.convert.average import average, num_tensors
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate import measure
from megatron_mixcpt.evaluate.comparison import CHANGES, Measured, add_measurements, change
from megatron_mixcpt.evaluate.loading import quiet_libraries
from megatron_mixcpt.evaluate.stored import rows_of
from megatron_mixcpt.evaluate.target import as_hf_directory
from megatron_mixcpt.files import MADE, check_writable, is_made, write_json
from megatron_mixcpt.huggingface.weights import weights_fingerprint
from megatron_mixcpt.progress import Progress
from megatron_mixcpt.report.figures import Series, legend, line_chart
from megatron_mixcpt.report.page import Figure, Page, Table

CURVES = {"domain_gain": "learned", "general_forgetting": "forgotten"}


def average_models(
    base: Path,
    tuned: Path,
    alphas: Sequence[float],
    out: Path,
    settings: measure.EvalSettings | None,
    *,
    allow_older: bool,
) -> None:
    """Write `OUT/alpha-X` for each alpha, a Hugging Face directory of (1 - alpha) base + alpha tuned; with `settings`
    measure them beside the two, and write the page after each.

    Args:
        base, tuned: run directories, checkpoints or Hugging Face directories.
        allow_older: an older checkpoint than the newest will do where that is damaged.

    Raises ConfigError for an alpha outside 0 to 1, what cannot be measured, and where something is in the way.
    """
    for alpha in alphas:
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"--alpha {alpha:g}: between 0 (the base model) and 1 (the tuned model)")
    _check_unwritten(out, alphas, measures=settings is not None)
    if settings is not None:
        measure.check_models([base, tuned], settings, allow_older=allow_older)
    check_writable(out)
    quiet_libraries()
    models = {"base": base, **{f"{alpha:g}": out / f"alpha-{alpha:g}" for alpha in alphas}, "tuned": tuned}
    paths = {name: str(path) for name, path in models.items()}
    with (
        as_hf_directory(base, allow_older=allow_older) as first,
        as_hf_directory(tuned, allow_older=allow_older) as last,
    ):
        ends = {"base": weights_fingerprint(first), "tuned": weights_fingerprint(last)}
        for alpha in alphas:
            made = {"command": "average", "version": __version__, "alpha": alpha} | ends
            if is_made(out / f"alpha-{alpha:g}", made):  # before a stop
                continue
            with Progress(f"averaging at {alpha:g}", num_tensors(last), "tensors") as progress:
                average(first, last, alpha, out / f"alpha-{alpha:g}", made, done=lambda name: progress.advance())
        if settings is None:
            return
        hf, measured = {"base": first, "tuned": last}, {}
        for name, path in models.items():
            measured[name] = measure.measure_model(hf.get(name, path), settings)
            write_averages(out, measured, paths, complete=name == "tuned")


def _check_unwritten(out: Path, alphas: Sequence[float], *, measures: bool) -> None:
    """Raise ConfigError where what is to be written is there already; what a stop left is no obstacle."""
    folders = [out / f"alpha-{alpha:g}" for alpha in alphas]
    there = [path for path in folders if path.is_dir() and any(path.iterdir()) and not (path / MADE).is_file()]
    table = out / "average.json"
    if measures and table.exists() and "tuned" in json.loads(table.read_text()):  # its last column
        there.append(table)
    if there:
        raise ConfigError(f"{there[0]} is there already: give another --out or remove it")


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
