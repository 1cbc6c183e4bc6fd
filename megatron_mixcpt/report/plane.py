"""A figure of one measure against another: a point for each model, and its way from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_mixcpt.report.figures import (
    ACROSS,
    DOWN,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Axis,
    text_at,
    x_axis,
    y_axis,
)
from megatron_mixcpt.report.page import Html
from megatron_mixcpt.units import number

APART = 3.0  # times as large is one x as another: from there on the axis is logarithmic
ROOM = 0.12  # of the axis, left and right of all points


@dataclass(frozen=True)
class Point:
    """A model at (x, y) in percent of y's whole; `second`: another share at the same x, drawn hollow."""

    name: str
    colour: int
    x: float
    y: float
    second: float


def plane_chart(label: str, points: Sequence[Point], x_label: str) -> Html:
    """An `<svg>`; y reaches from 0 to 100 %, x is positive. Lines lead from the first point to the others."""
    axis = _x_axis([point.x for point in points])
    shares = Axis(0, 100)

    def across(x: float) -> float:
        return LEFT + ACROSS * (TOP + DOWN - axis.place(x)) / DOWN

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += y_axis(shares, range(0, 101, 20), " %")
    parts += x_axis(axis.ticks(), across)
    start = points[0]
    for point in points:
        x, y, second = across(point.x), shares.place(point.y), shares.place(point.second)
        if point is not start:
            begin = f"M{across(start.x):.1f} {shares.place(start.y):.1f}"
            parts.append(f'<path class="line faint c{point.colour}" d="{begin} L{x:.1f} {y:.1f}"/>')
        parts.append(f'<path class="line faint c{point.colour}" d="M{x:.1f} {y:.1f} L{x:.1f} {second:.1f}"/>')
    for point in points:
        told = f"{point.name}: {point.y:.0f} %, {point.second:.0f} % (ring), {number(point.x)}"
        x = across(point.x)
        parts.append(
            f'<circle class="ring c{point.colour}" cx="{x:.1f}" cy="{shares.place(point.second):.1f}" r="4.5"/>'
            f'<circle class="dot c{point.colour}" cx="{x:.1f}" cy="{shares.place(point.y):.1f}" r="6">'
            f"<title>{escape(told)}</title></circle>"
        )
    note = f"{x_label}, logarithmic" if axis.logarithmic else x_label
    return Html("".join([*parts, text_at("axis", LEFT + ACROSS / 2, HEIGHT - 6, note), "</svg>"]))


def _x_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    if high > APART * low:
        room = (high / low) ** ROOM
        return Axis(low / room, high * room, True)
    room = max(ROOM * (high - low), 0.02 * high)
    return Axis(low - room, high + room)
