"""Figures as SVG: lines, and bars in groups. Their colours are the page's classes, so they are light and dark with it.

Drawn here and not by matplotlib, which has no picture that follows the page's theme, nothing to hover over, and takes
longer to import than a page takes to write.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from megatron_mixcpt.report.page import COLOURS, Html
from megatron_mixcpt.units import number

WIDTH, HEIGHT = 600, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
ACROSS, DOWN = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
SMALLEST = 1e-290  # a difference that can still be divided into steps
MAX_POINTS = 500  # a series has in the picture; beyond, the extremes of equal stretches stand for them
DOTS = 40  # up to so many points are marked
SMOOTHED = 60  # from so many on, a smoothed line goes over a faint one
OUTLIERS = 0.01  # share at either end that does not stretch the axis
CALM = 0.05  # of the largest value: an axis spans at least so much, so that noise looks like noise
LOGARITHMIC = 8.0  # times as large is one series as another: from there on the axis is logarithmic
FAR = 8.0  # times the height of all other series: one that is higher leaves the picture

Pair = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """`points`: x ascending; y None interrupts the line. `colour`: index of the class."""

    name: str
    points: Sequence[Pair]
    colour: int

    @property
    def values(self) -> list[float]:
        return [y for _, y in self.points if y is not None]


@dataclass(frozen=True)
class Axis:
    """Of y, from `low` to `high`."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, y: float) -> float:
        """Where a value lies in the picture, from the top."""
        low, high, y = map(math.log, (self.low, self.high, y)) if self.logarithmic else (self.low, self.high, y)
        return TOP + DOWN * (high - y) / (high - low)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.low, self.high, 5)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        inside = [tick for tick in fine if self.low <= tick <= self.high]
        return inside if len(inside) <= 7 else [tick for tick in inside if f"{tick:e}".startswith("1.0")]


def line_chart(
    label: str,
    series: Sequence[Series],
    x_label: str,
    *,
    smooth: bool = False,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Html:
    """An `<svg>` with its data in `data-chart`; at least one series has a finite value.

    Args:
        label: for who does not see the picture.
        smooth: draw a mean over neighbours where there are many points.
        zero: a line at 0, which is always in the picture.
        marks: places on the x axis and what happened there.
    """
    smoothed = [_smooth(one.points) if smooth and len(one.points) >= SMOOTHED else None for one in series]
    xs = [x for one in series for x, y in one.points if y is not None]
    axis = _axis(series, smoothed, zero)
    x_ticks = ticks(min(xs), max(xs), 6)
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + ACROSS * (x - x_low) / (x_high - x_low), axis.place(y)

    clip = f"clip-{zlib.crc32(label.encode()):x}"
    hover = {
        "x": [x_low, x_high],
        "label": x_label,
        "series": [
            {
                "name": one.name,
                "colour": one.colour,
                "points": [[x, float(f"{y:.8g}")] for x, y in thin(one.points) if y is not None],
            }
            for one in series
        ],
    }
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'data-chart="{escape(json.dumps(hover, separators=(",", ":")))}">',
        f'<clipPath id="{clip}">'
        f'<rect x="{LEFT - 4}" y="{TOP - 4}" width="{ACROSS + 8}" height="{DOWN + 8}"/></clipPath>',
        *y_axis(axis, axis.ticks()),
    ]
    parts += x_axis(x_ticks, lambda x: LEFT + ACROSS * (x - x_low) / (x_high - x_low))
    for where, what in marks:
        if x_low <= where <= x_high:
            x = LEFT + ACROSS * (where - x_low) / (x_high - x_low)
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + DOWN}">')
            parts.append(f"<title>{escape(what)}</title></line>")
    if zero:
        parts.append(
            f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis.place(0):.1f}" y2="{axis.place(0):.1f}"/>'
        )
    note = f"{x_label}, y logarithmic" if axis.logarithmic else x_label
    edge = FAR / 2 * max(abs(axis.low), abs(axis.high))
    if left := [one for one in series if max(map(abs, one.values), default=0.0) > edge]:
        most = number(max((y for one in left for y in one.values), key=abs))
        note += f"; {', '.join(one.name for one in left)} leaves the picture, as far as {most}"
    parts.append(f'{text_at("axis", LEFT + ACROSS / 2, HEIGHT - 6, note)}<g clip-path="url(#{clip})">')
    for one, over in zip(series, smoothed):
        faint = " faint" if over is not None else ""
        parts += [_path(run, place, f"line c{one.colour}{faint}") for run in _stretches(thin(one.points))]
        if over is not None:
            parts += [_path(run, place, f"line c{one.colour}") for run in _stretches(thin(over))]
        finite = [place(x, y) for x, y in one.points if y is not None]
        if len(finite) <= DOTS:
            parts += [f'<circle class="dot c{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in finite]
    return Html("".join([*parts, "</g></svg>"]))


def bar_chart(
    label: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    x_label: str = "",
    *,
    unit: str = "",
    marks: Sequence[tuple[float, str]] = (),
) -> Html:
    """An `<svg>` of grouped bars: one group for each label, one bar in it for each series. Values are not negative.

    Args:
        labels: of the groups; those that have no room are left out.
        marks: places between the groups (0 before the first, 1 after it) and what they are.
    """
    highest = max((value for values in series.values() for value in values), default=0)
    highest = highest if highest > 1e-9 else 1.0
    step = ticks(0, highest, 4)[1]
    lines = [place * step for place in range(math.ceil(highest / step - 1e-9) + 1)]
    axis = Axis(0, lines[-1])  # ends at a line, above all bars
    group = ACROSS / max(1, len(labels))
    bar = 0.8 * group / max(1, len(series))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *y_axis(axis, lines, unit),
    ]
    for index, (name, values) in enumerate(series.items()):
        for place, value in enumerate(values):
            x, y = LEFT + (place + 0.1) * group + index * bar, axis.place(value)
            parts.append(
                f'<rect class="bar c{index}" x="{x:.1f}" y="{y:.1f}" width="{bar:.1f}" height="{TOP + DOWN - y:.1f}">'
                f"<title>{escape(f'{labels[place]}, {name}: {value:g}{unit}')}</title></rect>"
            )
    every = math.ceil(len(labels) * max((len(text) for text in labels), default=1) / 62)
    for place, text in enumerate(labels):
        if place % every == 0:
            parts.append(text_at("tick", LEFT + (place + 0.5) * group, HEIGHT - BOTTOM + 17, text))
    for where, what in marks:
        x = LEFT + where * group
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + DOWN}"/>')
        right = where > len(labels) / 2
        anchor = f'text-anchor="{"end" if right else "start"}"'
        parts.append(
            f'<text class="tick" x="{x + (-5 if right else 5):.1f}" y="{TOP - 3}" {anchor}>{escape(what)}</text>'
        )
    return Html("".join([*parts, text_at("axis", LEFT + ACROSS / 2, HEIGHT - 6, x_label), "</svg>"]))


def legend(names: Iterable[tuple[str, int]]) -> Html:
    """Names with their colours."""
    keys = "".join(f'<span class="key c{colour % COLOURS}">{escape(name)}</span>' for name, colour in names)
    return Html(f'<div class="legend">{keys}</div>')


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if high - low < SMALLEST:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.8 * rough)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The ticks as text, with digits enough to tell neighbours apart."""
    digits = 4
    if len(values) > 1 and values[1] > values[0]:
        # A step of 2.5 has one digit more than its leading one.
        digits = max(digits, math.ceil(math.log10(max(map(abs, values)) / (values[1] - values[0]))) + 2)
    return [number(value, digits) for value in values]


def thin(points: Sequence[Pair]) -> list[Pair]:
    """At most about MAX_POINTS of them: of each stretch the smallest and the largest, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept: list[Pair] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [p for p in stretch if p[1] is not None]
        if len(finite) < len(stretch):
            kept.append(next(p for p in stretch if p[1] is None))
        if finite:
            extremes = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}  # type: ignore[arg-type, return-value]
            kept += sorted(extremes)  # type: ignore[type-var]
    return sorted(kept, key=lambda p: p[0])


def _smooth(points: Sequence[Pair]) -> list[Pair]:
    """Mean over about a twentieth of the points, centred, so that it does not lag. It begins at the first point, where
    losses fall fastest, and ends with the mean of the last, which one noisy step must not bend."""
    finite = [(x, y) for x, y in points if y is not None]
    sums = [0.0, *itertools.accumulate(y for _, y in finite)]
    widest, last = max(1, len(finite) // 40), len(finite) - 1
    means: list[Pair] = []
    for index, (x, _) in enumerate(finite):
        half = min(widest, index)
        first, end = index - half, min(index + half, last) + 1
        means.append((x, (sums[end] - sums[first]) / (end - first)))
    return means


def _axis(series: Sequence[Series], smoothed: Sequence[Sequence[Pair] | None], zero: bool) -> Axis:
    """All of smoothed lines and of few points, without the outliers of many; logarithmic where the series lie far
    apart, and without those that would flatten all others where a logarithm cannot help."""
    spans = []
    for one, over in zip(series, smoothed):
        finite = sorted(one.values)
        cut = int(len(finite) * OUTLIERS) if over is not None else 0
        values = finite[cut : len(finite) - cut] + [y for _, y in over or () if y is not None]
        if values:
            spans.append((values[0], values[-1], finite[len(finite) // 2]))
            spans[-1] = (min(values), max(values), spans[-1][2])
    middles = [middle for *_, middle in spans]
    positive = all(value > 0 for one in series for value in one.values)  # outliers have a place in the picture too
    if not zero and len(spans) > 1 and positive and max(middles) > LOGARITHMIC * min(middles):
        room = (max(high for _, high, _ in spans) / min(low for low, *_ in spans)) ** 0.06
        return Axis(min(low for low, *_ in spans) / room, max(high for _, high, _ in spans) * room, True)
    if zero and len(spans) > 2:
        reach = sorted(max(abs(low), abs(high)) for low, high, _ in spans)
        if reach[-1] > FAR * reach[-2] > 0:
            spans = [span for span in spans if max(abs(span[0]), abs(span[1])) < reach[-1]]
    low, high = min(low for low, *_ in spans), max(high for _, high, _ in spans)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    least = max(abs(low), abs(high)) * CALM or 1.0
    if zero:
        least = max(least, CALM)
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    room = (high - low) * 0.06
    return Axis(low if low >= 0 > low - room else low - room, high + room)


def y_axis(axis: Axis, lines: Sequence[float], unit: str = "") -> list[str]:
    """Lines across the picture at these values, each with its number and `unit`."""
    parts = []
    for tick, text in zip(lines, tick_labels(lines)):
        y = axis.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}{unit}</text>')
    return parts


def x_axis(values: Sequence[float], across: Callable[[float], float]) -> list[str]:
    """These numbers below the picture, each where `across` has its place."""
    below = HEIGHT - BOTTOM + 17
    return [text_at("tick", across(x), below, text) for x, text in zip(values, tick_labels(values))]


def text_at(kind: str, x: float, y: float, text: str) -> str:
    """Text of a class (tick, axis), centred at x."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _stretches(points: Sequence[Pair]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if len(run) > 1]


def _path(points: Sequence[tuple[float, float]], place: Any, classes: str) -> str:
    steps = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(place(*p) for p in points))
    return f'<path class="{classes}" d="{steps}"/>'
