"""The figure of a study: what was learned over what was forgotten, a curve an arm, and the front of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain

from megatron_mixcpt.report.figures import (
    ACROSS,
    DOWN,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Axis,
    text_at,
    ticks,
    x_axis,
    y_axis,
)
from megatron_mixcpt.report.page import Html

ROOM = 0.06  # of an axis, beyond all points
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True)
class Mark:
    """A model at (forgotten, gained). `error`: half widths of its interval."""

    told: str
    x: float
    y: float
    error: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """An arm: its learning rates, the averages of each with the base by alpha, and its mean over seeds."""

    colour: int
    rates: Sequence[Mark]
    averages: Sequence[Sequence[Mark]]
    mean: Mark | None


def trade_chart(
    label: str, curves: Sequence[Curve], front: Sequence[tuple[float, float]], x_label: str, unit: str
) -> Html:
    """An `<svg>`: x grows with the square root, so that a run that forgot everything leaves room for the others.

    Rings are averages, dots runs, the large dot with its cross the mean over seeds with its intervals, which are cut
    off where they leave the figure: that over two seeds is thirteen times as wide as what lies between them.
    """
    marks = [mark for curve in curves for mark in _all(curve)]
    xs, ys = [_root(mark.x) for mark in marks] + [0.0], [mark.y for mark in marks] + [0.0]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    wide, tall = max(right - left, 0.05), max(high - low, 1e-6)
    left, right = left - ROOM * wide, right + ROOM * wide
    axis = Axis(low - ROOM * tall, high + ROOM * tall)

    def place(x: float, y: float) -> tuple[float, float]:
        inside = min(max(_root(x), left), right), min(max(y, axis.low), axis.high)
        return LEFT + ACROSS * (inside[0] - left) / (right - left), axis.place(inside[1])

    lines = ticks(axis.low, axis.high, 5)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *y_axis(axis, lines, unit),
    ]
    parts += x_axis(_ticks(left, right), lambda x: place(x, 0)[0])
    start = place(0.0, 0.0)[0]
    parts.append(f'<line class="mark" x1="{start:.1f}" x2="{start:.1f}" y1="{TOP}" y2="{TOP + DOWN}"/>')
    if len(front) > 1:
        parts.append(f'<path class="front" d="{_path([place(*point) for point in front])}"/>')
    for curve in curves:
        ways = [("line faint", [*averages, run]) for run, averages in zip(curve.rates, curve.averages)]
        for kind, found in [*ways, ("line", curve.rates)]:
            if len(found) > 1:
                way = _path([place(mark.x, mark.y) for mark in found])
                parts.append(f'<path class="{kind} c{curve.colour}" d="{way}"/>')
        rings = chain.from_iterable(curve.averages)
        parts += [_circle("ring", curve.colour, *place(mark.x, mark.y), 4, mark) for mark in rings]
        parts += [_circle("dot", curve.colour, *place(mark.x, mark.y), 4, mark) for mark in curve.rates]
        if curve.mean is not None:
            mark = curve.mean
            x, y = place(mark.x, mark.y)
            if mark.error is not None:
                (low_x, high_x), (low_y, high_y) = _span(mark, 0), _span(mark, 1)
                across = _path([place(low_x, mark.y), place(high_x, mark.y)])
                down = _path([place(mark.x, low_y), place(mark.x, high_y)])
                parts.append(f'<path class="line c{curve.colour}" d="{across} {down}"/>')
            parts.append(_circle("dot", curve.colour, x, y, 7, mark))
    note = f"{x_label} (square-root scale)"
    return Html("".join([*parts, text_at("axis", LEFT + ACROSS / 2, HEIGHT - 6, note), "</svg>"]))


def _all(curve: Curve) -> list[Mark]:
    rings = chain.from_iterable(curve.averages)
    return [*curve.rates, *rings, *[curve.mean] * (curve.mean is not None)]  # type: ignore[list-item]


def _span(mark: Mark, index: int) -> tuple[float, float]:
    middle = (mark.x, mark.y)[index]
    half = mark.error[index] if mark.error else 0.0
    return middle - half, middle + half


def _root(x: float) -> float:
    return math.copysign(math.sqrt(abs(x)), x)


def _ticks(left: float, right: float) -> list[float]:
    """At most seven round values between two places of the axis."""
    every = [0.0, *STEPS, *(-step for step in STEPS)]
    inside = sorted(tick for tick in every if left <= _root(tick) <= right)
    kept: list[float] = []
    for tick in sorted(inside, key=abs, reverse=True):
        if all(abs(_root(tick) - _root(other)) > (right - left) / 9 for other in kept):
            kept.append(tick)
    return sorted(kept)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _circle(kind: str, colour: int, x: float, y: float, radius: float, mark: Mark) -> str:
    return (
        f'<circle class="{kind} c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        f"<title>{escape(mark.told)}</title></circle>"
    )
