"""Line charts as SVG, drawn here so that the page needs nothing else: colours by class, values for the hover beside it.

Text and lines take their colours from the page's style sheet (classes c0, c1, ... for series).
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 600, 270
SMALLEST = 1e-290  # a difference that can still be divided into steps
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
MAX_POINTS = 500  # a series has in the picture; beyond, the extremes of equal stretches stand for them
DOTS = 40  # up to so many points are marked
SMOOTHED = 60  # from so many on, a smoothed line goes over a faint one
OUTLIERS = 0.01  # share at either end that does not stretch the axis

Pair = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """`points`: x ascending; y None interrupts the line. `colour`: index of the class."""

    name: str
    points: Sequence[Pair]
    colour: int


def line_chart(label: str, series: Sequence[Series], x_label: str, *, smooth: bool = False, zero: bool = False) -> str:
    """An `<svg>` with its data in `data-chart`; at least one series has a finite value.

    Args:
        label: for who does not see the picture.
        smooth: draw a mean over neighbours where there are many points.
        zero: a line at 0, which is always in the picture.
    """
    smoothed = [_smooth(one.points) if smooth and len(one.points) >= SMOOTHED else None for one in series]
    xs = [x for one in series for x, y in one.points if y is not None]
    low, high = _range([(one.points, over) for one, over in zip(series, smoothed)], zero)
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(low, high, 5)
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + across * (x - x_low) / (x_high - x_low), TOP + down * (high - y) / (high - low)

    clip = f"clip-{zlib.crc32(label.encode()):x}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'data-chart="{escape(json.dumps(_hover(series, x_low, x_high, low, high, x_label), separators=(",", ":")))}">',
        f'<clipPath id="{clip}">'
        f'<rect x="{LEFT - 4}" y="{TOP - 4}" width="{across + 8}" height="{down + 8}"/></clipPath>',
    ]
    for tick, text in zip(y_ticks, tick_labels(y_ticks)):
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in zip(x_ticks, tick_labels(x_ticks)):
        x = place(tick, low)[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{text}</text>')
    if zero:
        y = place(x_low, 0.0)[1]
        parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    middle = LEFT + across / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<g clip-path="url(#{clip})">')
    for one, over in zip(series, smoothed):
        faint = " faint" if over is not None else ""
        parts += [_path(run, place, f"line c{one.colour}{faint}") for run in _stretches(thin(one.points))]
        if over is not None:
            parts += [_path(run, place, f"line c{one.colour}") for run in _stretches(thin(over))]
        finite = [place(x, y) for x, y in one.points if y is not None]
        if len(finite) <= DOTS:
            parts += [f'<circle class="dot c{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in finite]
    return "".join([*parts, "</g></svg>"])


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


def number(value: float, digits: int = 4) -> str:
    """Short, for people: 0.25, 12.5k, 3e-5; `digits` significant ones at most."""
    size = abs(value)
    if value == 0:
        return "0"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9995:
            return f"{value / limit:.{digits}g}{letter}" if size < 1e15 else f"{value:.2g}"
    if size < 1e-3:
        digits = max(3, digits - 1)
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):.{digits}g}e{int(exponent)}"
    return f"{value:.{digits}g}"


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
    """Mean over about a twentieth of the points, centred, so that it does not lag; shorter at both ends."""
    finite = [(x, y) for x, y in points if y is not None]
    sums = [0.0, *itertools.accumulate(y for _, y in finite)]
    widest, last = max(1, len(finite) // 40), len(finite) - 1
    means: list[Pair] = []
    for index, (x, _) in enumerate(finite):
        half = min(widest, index, last - index)
        means.append((x, (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)))
    return means


def _range(pairs: Sequence[tuple[Sequence[Pair], Sequence[Pair] | None]], zero: bool) -> tuple[float, float]:
    """Of the y axis: all of a smoothed line and of few points, without the outliers of many."""
    values: list[float] = [0.0] if zero else []
    for points, over in pairs:
        finite = sorted(y for _, y in points if y is not None)
        cut = int(len(finite) * OUTLIERS) if over is not None else 0
        values += finite[cut : len(finite) - cut]
        values += [y for _, y in over or () if y is not None]
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 1.0
    else:
        room = (high - low) * 0.06
    return (low if low >= 0 > low - room else low - room), high + room


def _stretches(points: Sequence[Pair]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if len(run) > 1]


def _path(points, place, classes: str) -> str:
    steps = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(place(*p) for p in points))
    return f'<path class="{classes}" d="{steps}"/>'


def _hover(series: Sequence[Series], x_low: float, x_high: float, low: float, high: float, x_label: str) -> dict:
    """What the page's script needs: the axes' ranges and each series thinned to what the picture shows."""
    return {
        "x": [x_low, x_high],
        "y": [low, high],
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
