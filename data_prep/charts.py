"""Small bar charts as SVG: nothing to import, the same bytes every time, shown by browsers and Markdown viewers."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 56, 42, 28
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def bar_chart(title: str, labels: Sequence[str], series: Mapping[str, Sequence[float]], unit: str = "") -> str:
    """Grouped vertical bars: one group for each label, one bar in it for each series. Values must not be negative."""
    highest = max((value for values in series.values() for value in values), default=0) or 1
    plot_height, plot_width = HEIGHT - TOP - BOTTOM, WIDTH - LEFT - 8
    step = plot_width / max(1, len(labels))
    bar = 0.8 * step / max(1, len(series))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="8" y="16" font-size="13">{escape(title)}</text>',
    ]
    for share in (0, 0.5, 1):
        y = TOP + plot_height * (1 - share)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#cccccc"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{short(highest * share)}{unit}</text>')
    for index, (name, values) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        if len(series) > 1:
            key = WIDTH - 110 * (len(series) - index)
            parts.append(f'<rect x="{key}" y="7" width="10" height="10" fill="{colour}"/>')
            parts.append(f'<text x="{key + 14}" y="16">{escape(name)}</text>')
        for place, value in enumerate(values):
            height = plot_height * value / highest
            x = LEFT + place * step + 0.1 * step + index * bar
            parts.append(
                f'<rect x="{x:.1f}" y="{TOP + plot_height - height:.1f}" width="{bar:.1f}" height="{height:.1f}" '
                f'fill="{colour}"><title>{escape(name)} {escape(labels[place])}: {value:g}{unit}</title></rect>'
            )
    for place, label in enumerate(labels):
        x = LEFT + (place + 0.5) * step
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def short(value: float) -> str:
    """1234567 -> '1.2M'."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"
