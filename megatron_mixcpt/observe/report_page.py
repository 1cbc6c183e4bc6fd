"""The report of one run, or several side by side, as one HTML file that needs nothing from elsewhere."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from megatron_mixcpt import __version__
from megatron_mixcpt.observe.console import duration
from megatron_mixcpt.observe.line_chart import Series, line_chart, number
from megatron_mixcpt.observe.report_tables import (
    checkpoint_table,
    differences,
    learned_table,
    mixture_table,
    pairs_table,
    settings_table,
    time_section,
)
from megatron_mixcpt.observe.run_data import Point, Run, distinct_names, read_run

REPORT = "report.html"  # in the run directory, unless another place is named
COLOURS = 8


class Curve(NamedTuple):
    """A metric as a chart."""

    title: str
    what: str
    metric: str
    smooth: bool = True
    scale: float = 1.0


TRAINING = (
    Curve("Training loss", "what is minimised, mean over the step", "train/loss"),
    Curve("Cross-entropy", "nats a target token", "train/ce"),
    Curve("Distillation", "divergence from the teacher, nats a target token", "train/kd"),
    Curve("Distance from the base model", "KL(base || student), nats a target token", "train/kl_base"),
    Curve("Swap rate", "% of target tokens that are not the teacher's first choice", "train/swap_rate", scale=100.0),
)
OPTIMIZATION = (
    Curve("Learning rate", "", "optim/lr", smooth=False),
    Curve("Gradient norm", "before clipping", "optim/grad_norm"),
)
FORGETTING = (
    Curve("Forgotten", "rise of the worst held-out loss in forget.on, nats a token", "forget/forgotten", smooth=False),
    Curve("Expected", "what it will be when it is measured next", "forget/expected", smooth=False),
    Curve("Distillation weight", "that the budget asks for", "forget/kd_weight", smooth=False),
    Curve("Learning rate factor", "that the budget asks for", "forget/lr_factor", smooth=False),
)
SPEED = (
    Curve("Throughput", "tokens a second and rank", "speed/tok_per_s_gpu"),
    Curve("MFU", "% of the device's peak", "speed/mfu", scale=100.0),
    Curve("Waiting for data", "% of the step", "speed/data_pct"),
    Curve("Memory", "GiB, most that rank 0 has held", "mem/peak_gib", smooth=False),
)
# Shown elsewhere, or of no use as a curve.
NOT_CURVES = (
    "train/tokens",
    "optim/skipped",
    "speed/step_seconds",
    "train/ce/",
    "train/kl_base/",
    "mix/",
    "time/",
    "ckpt/",
    "forget/",
)


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Read the run directories and write the page. Raises ConfigError where one is no run directory."""
    runs = [read_run(path) for path in paths]
    distinct_names(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp")
    temporary.write_text(page(runs), encoding="utf-8")
    temporary.replace(out)  # a browser never sees half of it


def page(runs: Sequence[Run]) -> str:
    """The whole HTML file."""
    title = " / ".join(run.name for run in runs)
    # Steps of runs with different batches are not the same amount of learning.
    by_tokens = len({run.settings.get("train.global_batch_size") for run in runs}) > 1
    draw = _Charts(runs, by_tokens)
    known = [curve.metric for curve in TRAINING + OPTIMIZATION + SPEED]
    rest = sorted({name for run in runs for name in run.series if _is_further(name, known)})
    sections = [
        _tiles(runs),
        _section("What it learned, what it forgot", learned_table(runs)),
        _section("Held-out preference pairs", pairs_table(runs)),
        _section("", _cards(draw.validation())),
        _section("The forgetting budget", _cards(draw.charts(FORGETTING))),
        _section("Training", _cards(draw.charts(TRAINING) + draw.by_source())),
        _section("More measurements", _cards(draw.charts([Curve(name, "", name) for name in rest]))),
        _section("The mixture", mixture_table(runs)),
        _section("Optimization", _cards(draw.charts(OPTIMIZATION))),
        _section("Where the time went", time_section(runs)),
        _section("", _cards(draw.charts(SPEED))),
        _section("Settings that differ", differences(runs) if len(runs) > 1 else ""),
        _section("Checkpoints", checkpoint_table(runs)),
        _section("", _events(runs)),
        _section("", "".join(settings_table(run) for run in runs)),
    ]
    now = datetime.now().strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)} &middot; mixcpt report</title>"
        f"<style>\n{_asset('report.css')}</style></head>\n<body><main>"
        f'<header><div><h1>{escape(title)}</h1><div class="soft">{_subtitle(runs)}</div></div>'
        '<button id="theme" type="button">Dark</button></header>\n'
        + "\n".join(part for part in sections if part)
        + f"\n<footer>Written {now} by megatron-mixcpt {__version__} from "
        + ", ".join(escape(f"{run.path}/metrics.jsonl") for run in runs)
        + f'.</footer></main><div id="tip" hidden></div>\n<script>\n{_asset("report.js")}</script></body></html>\n'
    )


def _asset(name: str) -> str:
    return (files("megatron_mixcpt.observe") / "page" / name).read_text(encoding="utf-8")


def _is_further(name: str, known: Sequence[str]) -> bool:
    """Whether a metric has no place of its own on the page, as those of other objectives."""
    if name.startswith("val/"):
        return not name.endswith(("/loss", "/ppl", "/accuracy", "/margin"))
    return name not in known and not name.startswith(NOT_CURVES)


def _section(title: str, content: str) -> str:
    if not content:
        return ""
    return (f"<h2>{title}</h2>" if title else "<div style='height:14px'></div>") + content


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return "<br>".join(
            f'<span class="key c{i % COLOURS}">{escape(run.name)}</span> {_state(run)}' for i, run in enumerate(runs)
        )
    run = runs[0]
    model = next(
        (run.settings[key] for key in ("model.hf", "model.preset", "model.checkpoint") if run.settings.get(key)), None
    )
    return (f"{escape(str(model))} &middot; " if model else "") + _state(run)


def _state(run: Run) -> str:
    total = run.total_steps
    if not run.steps:
        return "no step yet"
    if total is not None and run.steps >= total:
        return f"finished, {run.steps} steps"
    of = f" of {total}" if total else ""
    return f"at step {run.steps}{of}, last written {run.written:%Y-%m-%d %H:%M}"


def _tiles(runs: Sequence[Run]) -> str:
    facts: list[tuple[str, Callable[[Run], str | None]]] = [
        ("steps", lambda run: f"{run.steps:,}" if run.steps else "0"),
        ("target tokens", lambda run: number(run.tokens, 3)),
        ("training loss", lambda run: _number(_recent(run, "train/loss"))),
        ("tokens/s/rank", lambda run: _number(_median(run, "speed/tok_per_s_gpu"))),
        ("MFU", lambda run: f"{value:.1%}" if (value := _median(run, "speed/mfu")) is not None else None),
        ("time", lambda run: duration(seconds) if (seconds := _seconds(run)) else None),
        ("GiB at most", lambda run: _number(run.last("mem/peak_gib"))),
        ("steps skipped", lambda run: f"{int(run.last('optim/skipped') or 0)}" if run.steps else None),
    ]
    cells = []
    for label, fact in facts:
        values = [fact(run) for run in runs]
        if all(value is None for value in values):
            continue
        if len(runs) == 1:
            shown = f"<b>{values[0]}</b>"
        else:
            shown = "".join(f'<b class="key c{i % COLOURS}">{value or "–"}</b>' for i, value in enumerate(values))
        cells.append(f'<div class="tile">{shown}<span>{label}</span></div>')
    several = " several" if len(runs) > 1 else ""
    return f'<div class="tiles{several}">{"".join(cells)}</div>'


def _number(value: float | None) -> str | None:
    return None if value is None else number(value, 3)


def _recent(run: Run, name: str) -> float | None:
    """Mean of the last tenth of a noisy metric."""
    values = run.values(name)
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _median(run: Run, name: str) -> float | None:
    values = run.values(name)
    return statistics.median(values) if values else None


def _seconds(run: Run) -> float:
    parts = sum(sum(run.values(name)) for name in run.series if name.startswith("time/"))
    return parts or sum(run.values("speed/step_seconds"))


def _events(runs: Sequence[Run]) -> str:
    """What went wrong on the way."""
    notes = []
    for run in runs:
        where = f"{escape(run.name)}, " if len(runs) > 1 else ""
        before = 0.0
        for point in run.series.get("optim/skipped", []):
            if point.value is not None and point.value > before:
                notes.append(f"{where}step {point.step}: skipped, it was not finite or a spike")
                before = point.value
        for point in run.series.get("ckpt/failed", []):
            notes.append(f"{where}step {point.step}: the checkpoint could not be saved")
    if not notes:
        return ""
    more = f"<li>and {len(notes) - 20} more</li>" if len(notes) > 20 else ""
    items = "".join(f"<li>{note}</li>" for note in notes[:20])
    return f'<div class="card"><h3>Events</h3><ul class="notes">{items}{more}</ul></div>'


class _Charts:
    """Line charts over all runs: a colour a run, or, of one run, a colour a source."""

    def __init__(self, runs: Sequence[Run], by_tokens: bool) -> None:
        self._runs, self._by_tokens = runs, by_tokens
        self._label = "target tokens" if by_tokens else "step"

    def charts(self, wanted: Sequence[Curve]) -> list[str]:
        """One card for each metric that some run has."""
        cards = []
        for curve in wanted:
            series = [
                self._series(run, curve.metric, run.name, i, curve.scale)
                for i, run in enumerate(self._runs)
                if run.values(curve.metric)
            ]
            if series:
                cards.append(self._card(curve.title, curve.what, series, smooth=curve.smooth))
        return cards

    def validation(self) -> list[str]:
        """Validation: by source in one chart of one run, a chart a source of several."""
        cards = self._family("Validation perplexity", "held-out text of each source", "val/", "/ppl")
        change = "validation loss against before training, nats; below 0 learned, above 0 forgotten"
        cards += self._family("Forgetting", change, "forget/", "/delta", zero=True)
        preferred = "share of held-out pairs whose chosen answer has the higher reward, a tie counting half"
        cards += self._family("Accuracy on held-out pairs", preferred, "val/", "/accuracy")
        return cards + self._family("Margin on held-out pairs", "reward of chosen minus rejected", "val/", "/margin")

    def by_source(self) -> list[str]:
        return self._family("Cross-entropy by source", "nats a target token", "train/ce/", "", smooth=True)

    def _family(
        self, title: str, what: str, prefix: str, suffix: str, *, zero: bool = False, smooth: bool = False
    ) -> list[str]:
        sources = list(dict.fromkeys(name for run in self._runs for name in run.sources(prefix, suffix)))
        sources = [s for s in sources if any(run.values(f"{prefix}{s}{suffix}") for run in self._runs)]
        if not sources:
            return []
        if len(self._runs) == 1:
            series = [self._series(self._runs[0], f"{prefix}{s}{suffix}", s, i) for i, s in enumerate(sources)]
            return [self._card(title, what, series, zero=zero, smooth=smooth)]
        return [
            self._card(
                f"{title}: {source}",
                what,
                [
                    self._series(run, name, run.name, i)
                    for i, run in enumerate(self._runs)
                    if run.values(name := f"{prefix}{source}{suffix}")
                ],
                zero=zero,
                smooth=smooth,
            )
            for source in sources
        ]

    def _series(self, run: Run, name: str, shown: str, colour: int, scale: float = 1.0) -> Series:
        def pair(point: Point) -> tuple[float, float | None]:
            x = point.tokens if self._by_tokens else point.step
            return x, None if point.value is None else point.value * scale

        return Series(shown, [pair(point) for point in run.series[name]], colour % COLOURS)

    def _card(self, title: str, what: str, series: list[Series], *, zero: bool = False, smooth: bool = False) -> str:
        legend = ""
        if len(series) > 1 or len(self._runs) > 1:
            keys = "".join(f'<span class="key c{one.colour}">{escape(one.name)}</span>' for one in series)
            legend = f'<div class="legend">{keys}</div>'
        return (
            f'<div class="card"><header><h3>{escape(title)}</h3><span class="what">{escape(what)}</span></header>'
            f"{legend}{line_chart(title, series, self._label, smooth=smooth, zero=zero)}</div>"
        )


def _cards(cards: list[str]) -> str:
    return f'<div class="charts">{"".join(cards)}</div>' if cards else ""
