"""The report of one run, or of several side by side, as a page."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_mixcpt.files import write_whole
from megatron_mixcpt.observe import run_tables
from megatron_mixcpt.observe.names import RESULT
from megatron_mixcpt.observe.run_data import Point, Run, distinct_names, read_run
from megatron_mixcpt.report.figures import Series, legend, line_chart
from megatron_mixcpt.report.page import COLOURS, Figure, Html, Page, Text, html, join, key
from megatron_mixcpt.units import duration, number, percent

REPORT = "report.html"  # in the run directory, unless another place is named
EVENTS_SHOWN = 20


class Curve(NamedTuple):
    """A metric as a chart."""

    title: str
    what: str
    metric: str
    smooth: bool = True
    scale: float = 1.0
    bound: str = ""  # metric that it must not rise above


TRAINING = (
    Curve("Training loss", "what is minimised, mean over the step", "train/loss"),
    Curve("Cross-entropy", "nats a target token", "train/ce"),
    Curve("Distillation", "divergence from the teacher, nats a target token", "train/kd"),
    Curve("Distance from the base model", "KL(base || student), nats a target token", "train/kl_base"),
    Curve("Swap rate", "% of target tokens that are not the teacher's first choice", "train/swap_rate", scale=100.0),
)
PREFERENCE = (
    Curve("Accuracy", "% of pairs whose chosen answer has the higher reward", "rewards/accuracy", scale=100.0),
    Curve("Margin", "reward of chosen minus rejected", "rewards/margin"),
    Curve("Distance from the start", "mean log-ratio to the reference a token", "rewards/kl"),
)
FORGETTING = (
    Curve(
        "Forgotten",
        "rise of the worst loss in forget.on, nats a token",
        "forget/forgotten",
        smooth=False,
        bound="forget/budget",
    ),
    Curve("Expected", "what it will be when it is measured next", "forget/expected", smooth=False),
    Curve("Distillation weight", "that the budget asks for", "forget/kd_weight", smooth=False),
    Curve("Learning rate factor", "that the budget asks for", "forget/lr_factor", smooth=False),
)
ROUTING = (
    Curve(
        "Routing changed", "% of the choices of experts that the base model does not make", "moe/changed", scale=100.0
    ),
    Curve("Largest load", "of an expert, in equal shares", "moe/load_max"),
    Curve("Idle experts", "% that no token of the step went through", "moe/idle", scale=100.0),
    Curve("Balance", "load times mean probability, summed; 1 where all experts are in equal use", "moe/balance"),
    Curve("Routers' z", "mean square of the log-sum-exp of their scores", "moe/z"),
)
OPTIMIZATION = (
    Curve("Learning rate", "", "optim/lr", smooth=False),
    Curve("Gradient norm", "before clipping", "optim/grad_norm"),
)
SPEED = (
    Curve("Throughput", "tokens a second and rank", "speed/tok_per_s_gpu"),
    Curve("MFU", "% of the device's peak", "speed/mfu", scale=100.0),
    Curve("Waiting for data", "% of the step", "speed/data_pct"),
    Curve("Memory", "GiB, most that rank 0 has held", "mem/peak_gib", smooth=False),
)
EXTREMES = {"load_max": "largest", "load_min": "smallest"}
# Shown elsewhere, or of no use as a curve.
NOT_CURVES = (
    "train/tokens", "train/ce/", "train/kl_base/", "optim/skipped", "speed/step_seconds", "mix/", "time/", "ckpt/",
    "forget/", "run/", "data/pairs", "moe/",
)  # fmt: skip


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Read the run directories and write the page. Raises ConfigError where one is no run directory."""
    runs = [read_run(path) for path in paths]
    distinct_names(runs)
    write_whole(out, page(runs))  # a browser never sees half of it


def page(runs: Sequence[Run]) -> str:
    """The whole HTML file."""
    # Steps of runs with different batches are not the same amount of learning.
    by_tokens = len({run.settings.get("train.global_batch_size") for run in runs}) > 1
    draw = _Charts(runs, by_tokens)
    curves = TRAINING + PREFERENCE + OPTIMIZATION + SPEED
    rest = sorted({name for run in runs for name in run.series if _is_further(name, [c.metric for c in curves])})
    result = Page(" / ".join(run.name for run in runs), _subtitle(runs))
    result.tiles(_facts(runs))
    result.section("What it learned, what it forgot", *run_tables.learned(runs))
    result.figures("", draw.validation())
    result.figures("The forgetting budget", draw.charts(FORGETTING))
    result.section("", *_decisions(runs))
    result.section("Held-out preference pairs", *run_tables.pairs(runs))
    result.figures("", draw.pairs())
    aligned = any(run.aligned_by == "dpo" for run in runs)
    result.figures("Training", draw.charts(PREFERENCE * aligned + TRAINING) + draw.by_source())
    result.section("", *_events(runs))
    result.figures("Which experts tokens go to", draw.charts(ROUTING) + draw.by_layer())
    result.figures("More measurements", draw.charts([Curve(name, "", name) for name in rest]))
    result.section("The mixture", *run_tables.mixture(runs))
    result.figures("Optimization", draw.charts(OPTIMIZATION))
    result.section("Where the time went", *run_tables.times(runs))
    result.figures("", draw.charts(SPEED))
    if len(runs) > 1:
        result.section("Settings that differ", *run_tables.differences(runs))
    result.section("Checkpoints", *run_tables.checkpoints(runs))
    for run in runs:
        if run.settings:
            result.folded(f"All settings of {run.name}", run_tables.settings(run))
    return result.html()


def _is_further(name: str, known: Sequence[str]) -> bool:
    """Whether a metric has no place of its own on the page, as those of other objectives."""
    if name.startswith("val/"):
        return not name.endswith(("/loss", "/ppl", "/accuracy", "/margin"))
    return name not in known and not name.startswith(NOT_CURVES)


def _subtitle(runs: Sequence[Run]) -> Html:
    if len(runs) > 1:
        return Html("<br>".join(join(key(run.name, i), " ", _state(run)) for i, run in enumerate(runs)))
    settings = runs[0].settings
    named = [
        settings[name] for name in ("model.hf", "model.preset", "model.checkpoint", "model.run") if settings.get(name)
    ]
    method = f"{runs[0].aligned_by.upper()} · " if runs[0].aligned_by else ""
    return html(method + "".join(f"{name} · " for name in named[:1]) + _state(runs[0]))


def _state(run: Run) -> str:
    total = run.total_steps
    if not run.steps:
        return "no step yet"
    if total is not None and run.steps >= total:
        return f"finished, {run.steps} steps"
    of = f" of {total}" if total else ""
    if run.decisions and run.decisions[-1][1].startswith(RESULT):
        return f"ended by its forgetting budget at step {run.steps}{of}"
    return f"at step {run.steps}{of}, last written {run.written:%Y-%m-%d %H:%M}"


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """The first row: what one asks first, of alignment something else than of training."""
    first: list[tuple[str, Callable[[Run], str | None]]]
    if all(run.aligned_by == "dpo" for run in runs):
        first = [
            ("pairs seen", lambda run: number(sum(run.values("data/pairs")), 3)),
            (
                "accuracy now",
                lambda run: percent(now) if (now := _recent(run, "rewards/accuracy")) is not None else None,
            ),
            ("margin now", lambda run: _number(_recent(run, "rewards/margin"))),
            ("loss now", lambda run: _number(_recent(run, "train/loss"))),
        ]
    elif all(run.aligned_by == "sft" for run in runs):
        first = [
            ("answer tokens", lambda run: number(run.tokens, 3)),
            ("cross-entropy at first", lambda run: _number(run.first("train/ce"))),
            ("cross-entropy now", lambda run: _number(_recent(run, "train/ce"))),
        ]
    else:
        first = [
            ("target tokens", lambda run: number(run.tokens, 3)),
            ("training loss", lambda run: _number(_recent(run, "train/loss"))),
        ]
    rest: list[tuple[str, Callable[[Run], str | None]]] = [
        ("tokens/s/rank", lambda run: _number(_median(run, "speed/tok_per_s_gpu"))),
        ("MFU", lambda run: percent(value) if (value := _median(run, "speed/mfu")) is not None else None),
        ("time", lambda run: duration(seconds) if (seconds := run.seconds()) else None),
        ("GiB at most", lambda run: _number(max(run.values("mem/peak_gib"), default=None))),
        ("restarts", lambda run: str(count) if (count := len(run.values("run/resumed"))) else None),
        ("steps skipped", lambda run: f"{int(run.last('optim/skipped') or 0)}" if run.steps else None),
    ]
    facts = [("steps", lambda run: f"{run.steps:,}"), *first, *rest]
    return [(name, [fact(run) for run in runs]) for name, fact in facts]


def _number(value: float | None) -> str | None:
    return None if value is None else number(value, 3)


def _recent(run: Run, name: str) -> float | None:
    """Mean of the last tenth of a noisy metric."""
    values = run.values(name)
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _median(run: Run, name: str) -> float | None:
    values = run.values(name)
    return statistics.median(values) if values else None


def _decisions(runs: Sequence[Run]) -> list[Text]:
    """What forgetting budgets made of the runs, the latest decisions of each."""
    lines: list[str] = []
    for run in runs:
        where = f"{run.name}, " if len(runs) > 1 else ""
        if (earlier := len(run.decisions) - EVENTS_SHOWN) > 0:
            lines.append(f"{where}{earlier} earlier decisions are in metrics.jsonl")
        lines += [f"{where}step {step}: {what}" for step, what in run.decisions[-EVENTS_SHOWN:]]
    return [Text(Html("<b>What was decided</b><br>" + "<br>".join(map(html, lines))), "small")] if lines else []


def _events(runs: Sequence[Run]) -> list[Text]:
    """Interruptions, and what went wrong on the way."""
    notes: list[str] = []
    for run in runs:
        where = f"{run.name}, " if len(runs) > 1 else ""
        found: list[tuple[int, str]] = []
        before = 0.0
        for point in run.series.get("optim/skipped", []):
            if point.value is not None and point.value > before:
                found.append((point.step, "skipped, it was not finite or a spike"))
                before = point.value
        found += [(p.step, "the checkpoint could not be saved") for p in run.series.get("ckpt/failed", [])]
        found += [(p.step, "interrupted, and resumed from here") for p in run.series.get("run/resumed", [])]
        notes += [f"{where}step {step}: {what}" for step, what in sorted(found)]
    if len(notes) > EVENTS_SHOWN:
        notes[EVENTS_SHOWN:] = [f"and {len(notes) - EVENTS_SHOWN} more"]
    return [Text(Html("<b>Events</b><br>" + "<br>".join(map(html, notes))), "small")] if notes else []


class _Charts:
    """Line charts over all runs: a colour a run, or, of one run, a colour a source."""

    def __init__(self, runs: Sequence[Run], by_tokens: bool) -> None:
        self._runs, self._by_tokens = runs, by_tokens
        self._label = "target tokens" if by_tokens else "step"
        self._kinds = {source: kind for run in runs for source, kind in run.kinds.items()}
        self._order = list(dict.fromkeys(s for run in runs for s in [*run.sources("val/", "/loss"), *run.shares]))
        self._order += dict.fromkeys(kind for kind in self._kinds.values() if kind not in self._order)
        self._marks = [
            (self._x(point), f"{run.name}: interrupted and resumed at step {point.step}")
            for run in runs
            for point in run.series.get("run/resumed", [])
        ]

    def charts(self, wanted: Iterable[Curve]) -> list[Figure]:
        """One figure for each metric that some run has."""
        figures = []
        for curve in wanted:
            series = [
                self._series(run, curve.metric, run.name, i, curve.scale)
                for i, run in enumerate(self._runs)
                if run.values(curve.metric)
            ]
            bounded = [(i, run) for i, run in enumerate(self._runs) if curve.bound and run.values(curve.bound)]
            series += [self._series(run, curve.bound, f"budget, {run.name}", i + len(self._runs)) for i, run in bounded]
            if series:
                figures.append(self._figure(curve.title, curve.what, series, smooth=curve.smooth))
        return figures

    def validation(self) -> list[Figure]:
        """By source in one figure of one run, a figure a source of several; the domain and all else apart."""
        figures = self._family("Perplexity", "held-out text", "val/", "/ppl")
        change = "validation loss against before training, nats; below 0 learned, above 0 forgotten"
        return figures + self._family("Change", change, "forget/", "/delta", zero=True)

    def pairs(self) -> list[Figure]:
        preferred = "share of held-out pairs whose chosen answer has the higher reward, a tie counting half"
        figures = self._family("Accuracy on held-out pairs", preferred, "val/", "/accuracy", apart=False)
        what = "reward of chosen minus rejected"
        return figures + self._family("Margin on held-out pairs", what, "val/", "/margin", apart=False)

    def by_layer(self) -> list[Figure]:
        """What the routers of a mixture of experts do, layer by layer, at the end of the runs."""
        changed = self._layers("Routing changed, by layer", "% of the choices, lately", {"changed": ""}, 100.0)
        return changed + self._layers("Load, by layer", "largest and smallest, lately", EXTREMES, 1.0)

    def _layers(self, title: str, what: str, metrics: dict[str, str], scale: float) -> list[Figure]:
        series = []
        for i, (run, (metric, short)) in enumerate(itertools.product(self._runs, metrics.items())):
            values = {int(layer): _recent(run, f"moe/{metric}/{layer}") for layer in run.sources(f"moe/{metric}/", "")}
            points = [(layer, value * scale) for layer, value in sorted(values.items()) if value is not None]
            shown = ", ".join([run.name] * (len(self._runs) > 1 or not short) + [short] * bool(short))
            if points:
                series.append(Series(shown, points, i % COLOURS))
        if not series:
            return []
        names = legend((one.name, one.colour) for one in series) if len(series) > 1 else ""
        return [Figure(line_chart(title, series, "layer"), title, what, names)]

    def by_source(self) -> list[Figure]:
        what = "nats a target token"
        kinds = self._family("Distance from the base by kind", what, "train/kl_base/", "", smooth=True, apart=False)
        return self._family("Cross-entropy by source", what, "train/ce/", "", smooth=True, apart=False) + kinds

    def _family(
        self,
        title: str,
        what: str,
        prefix: str,
        suffix: str,
        *,
        zero: bool = False,
        smooth: bool = False,
        apart: bool = True,
    ) -> list[Figure]:
        sources = dict.fromkeys(name for run in self._runs for name in run.sources(prefix, suffix))
        there = [s for s in sources if any(run.values(f"{prefix}{s}{suffix}") for run in self._runs)]
        groups = [(title, there)]
        if len(self._runs) > 1:
            groups = [(f"{title}: {source}", [source]) for source in there]
        elif apart and self._kinds:
            domain = [source for source in there if self._kinds.get(source) == "domain"]
            general = [source for source in there if source not in domain]
            groups = [(f"{title}, domain", domain), (f"{title}, everything else", general)]
        figures = []
        for name, members in groups:
            series = [
                self._series(run, metric, run.name if len(self._runs) > 1 else source, self._colour(source, i))
                for source in members
                for i, run in enumerate(self._runs)
                if run.values(metric := f"{prefix}{source}{suffix}")
            ]
            if series:
                figures.append(self._figure(name, what, series, zero=zero, smooth=smooth))
        return figures

    def _colour(self, source: str, run: int) -> int:
        """Of a run where there are several, else of the source, the same in all figures."""
        return run if len(self._runs) > 1 or source not in self._order else self._order.index(source)

    def _x(self, point: Point) -> float:
        return point.tokens if self._by_tokens else point.step

    def _series(self, run: Run, name: str, shown: str, colour: int, scale: float = 1.0) -> Series:
        points = [(self._x(p), None if p.value is None else p.value * scale) for p in run.series[name]]
        return Series(shown, points, colour % COLOURS)

    def _figure(
        self, title: str, what: str, series: list[Series], *, zero: bool = False, smooth: bool = False
    ) -> Figure:
        several = len(series) > 1 or len(self._runs) > 1
        names = legend((one.name, one.colour) for one in series) if several or "," in title else ""
        chart = line_chart(title, series, self._label, smooth=smooth, zero=zero, marks=self._marks)
        return Figure(chart, title, what, names)
