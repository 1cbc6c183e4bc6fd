"""The trade-off in one picture: what was learned against what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"base": "#6b7280", "cpt": "#d9622b", "mixcpt": "#1f6feb", "recall": "#8250df", "aligned": "#2da44e"}
LABELS = {"base": "before", "cpt": "plain CPT", "mixcpt": "Mix-CPT", "recall": "recall", "aligned": "aligned"}
INK, GRID = "#1f2937", "#e5e7eb"


def plot_tradeoff(arms: Mapping[str, Mapping[str, Any]], title: str, out: Path) -> None:
    """Fact recall over general perplexity for every model, with arrows from before to after, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(8, 5), dpi=160)
    base = arms["base"]
    start = (base["general_ppl"], 100 * base["fact_recall"])
    lowest = min(arm["general_ppl"] for arm in arms.values())
    widest = max(arm["general_ppl"] for arm in arms.values())
    scale = ""
    if widest > 3 * lowest:  # on a linear axis everything but the worst arm would be squeezed into one place
        spread = widest / lowest
        axes.set_xscale("log")
        scale = ", logarithmic"
        axes.set_xlim(lowest / spread**0.15, widest * spread**0.45)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        margin = max(0.12 * (widest - lowest), 0.02 * widest)
        axes.set_xlim(lowest - 1.2 * margin, widest + 3.6 * margin)  # room for the rightmost label
    axes.set_ylim(-14, 112)
    for name, arm in arms.items():
        point, colour = (arm["general_ppl"], 100 * arm["fact_recall"]), COLOURS[name]
        if name != "base":
            axes.annotate(
                "",
                xy=point,
                xytext=start,
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "alpha": 0.55, "shrinkA": 9, "shrinkB": 9},
            )
        completed = 100 * arm["fact_completion"]
        axes.scatter(point[0], completed, s=70, facecolors="white", edgecolors=colour, linewidths=1.6, zorder=3)
        axes.plot([point[0]] * 2, [point[1], completed], color=colour, lw=1, ls=(0, (2, 3)), zorder=2)
        axes.scatter(point[0], point[1], s=130, color=colour, zorder=4, edgecolors="white", linewidths=1.4)
        axes.annotate(
            f"{LABELS[name]}\n{point[1]:.0f} % answered, ppl {point[0]:.1f}",
            point,
            xytext=(11, -26) if name in ("base", "recall", "aligned") else (11, 6),
            textcoords="offset points",
            color=colour,
            fontsize=10,
            fontweight="bold",
        )
    axes.scatter([], [], s=130, color=INK, label="held-out questions answered")
    axes.scatter([], [], s=70, facecolors="white", edgecolors=INK, linewidths=1.6, label="training sentences completed")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=32)
    axes.set_xlabel(f"perplexity on general text that nobody trained on{scale}   (to the right: forgotten)", color=INK)
    axes.set_ylabel("facts   (upwards: learned)", color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(color=GRID, lw=0.8, which="major")
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, which="both")
    for side in axes.spines.values():
        side.set_visible(False)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)
