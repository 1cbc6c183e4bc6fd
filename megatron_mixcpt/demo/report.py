"""The demo's report: report.json for programs, a page and its Markdown for people, all from the same measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixcpt.files import write_json
from megatron_mixcpt.report.figures import legend
from megatron_mixcpt.report.page import Cell, Figure, Page, Table, Text
from megatron_mixcpt.report.plane import Point, plane_chart

Arm = Mapping[str, Any]
"""What `measure` returned for one model: `base`, `cpt`, `mixcpt`, and `aligned`, which goes on from `mixcpt`."""

NUM_SAMPLES = 3


def general_loss(arms: Mapping[str, Arm], name: str) -> float:
    """Relative rise of the general perplexity of `name` over the base; negative if it fell."""
    return arms[name]["general_ppl"] / arms["base"]["general_ppl"] - 1.0


def verdict(arms: Mapping[str, Arm]) -> str:
    """What the numbers say, whichever way they fell."""
    mixcpt, cpt = general_loss(arms, "mixcpt"), general_loss(arms, "cpt")
    amounts = f"its general perplexity changed by {_change(mixcpt)}, that of cpt by {_change(cpt)}"
    if mixcpt < cpt:
        forgetting = f"mixcpt lost less general perplexity than cpt: {amounts}."
    else:
        forgetting = f"mixcpt did not lose less general perplexity than cpt: {amounts}."
    return " ".join(
        [
            forgetting,
            _compare(arms, "fact_recall", "Held-out questions answered"),
            _compare(arms, "fact_completion", "Training sentences completed"),
            _aligned(arms),
        ]
    )


def _aligned(arms: Mapping[str, Arm]) -> str:
    before, after = arms["mixcpt"], arms["aligned"]
    return (
        f"Alignment with a few samples: answers of the asked format {before['format_following']:.0%} -> "
        f"{after['format_following']:.0%}, questions answered {before['fact_recall']:.0%} -> "
        f"{after['fact_recall']:.0%}, "
        f"general perplexity {_change(after['general_ppl'] / before['general_ppl'] - 1.0)}."
    )


def _change(relative: float) -> str:
    """`+32.7%`, or `a factor of 26.9` where a percentage would be hard to read."""
    return f"{relative:+.1%}" if relative < 2.0 else f"a factor of {relative + 1:.1f}"


def _compare(arms: Mapping[str, Arm], key: str, what: str) -> str:
    mixcpt, cpt = arms["mixcpt"][key], arms["cpt"][key]
    word = "more than" if mixcpt > cpt else "fewer than" if mixcpt < cpt else "as many as"
    numbers = f"{mixcpt:.0%} against {cpt:.0%}; before: {arms['base'][key]:.0%}"
    return f"{what}: {word} cpt ({numbers})."


def sample_questions(arm: Arm, count: int = NUM_SAMPLES) -> list[int]:
    """Indices of `count` questions spread evenly over the list: chosen by position, never by the answers."""
    total = len(arm["answers"])
    return [i * total // count + i for i in range(count)] if total > 2 * count else list(range(min(count, total)))


def write_report(
    folder: Path,
    arms: Mapping[str, Arm],
    *,
    title: str,
    settings: Sequence[tuple[str, str]],
    seconds: Sequence[tuple[str, float]],
) -> None:
    """Write `report.json` (measurements by arm, in their order), `report.html` and `report.md` into `folder`.

    `settings` are (name, value) lines, `seconds` the parts of the run with their duration.
    """
    write_json(folder / "report.json", dict(arms))
    page = Page(title, "One seed and one small domain: this shows the mechanism, it is not a benchmark.")
    page.section("", Text(verdict(arms), ""), metrics_table(arms), Text(how_measured(arms)))
    page.figures("", [_learned_and_forgotten(arms)])
    samples = [_sample(arms, index) for index in sample_questions(arms["base"])]
    chosen = Text("Taken from fixed places of the list, whatever the answers.")
    page.section("Three questions, before and after", chosen, *samples)
    page.section("Settings", Table(["setting", "value"], settings))
    rows: list[list[Cell]] = [[name, f"{value:.0f}"] for name, value in seconds]
    page.section("Time", Table(["part", "seconds"], [*rows, ["all", f"{sum(value for _, value in seconds):.0f}"]]))
    page.write(folder / "report.html")


def metrics_table(arms: Mapping[str, Arm]) -> Table:
    """The measurements, one column a model."""
    others = list(arms)[1:]
    rows: list[tuple[str, list[Cell]]] = [
        ("facts: held-out questions answered", [f"{arm['fact_recall']:.0%}" for arm in arms.values()]),
        ("facts: training sentences completed", [f"{arm['fact_completion']:.0%}" for arm in arms.values()]),
        ("answers in the asked format", [f"{arm['format_following']:.0%}" for arm in arms.values()]),
        ("domain perplexity (unseen documents)", [f"{arm['domain_ppl']:.2f}" for arm in arms.values()]),
        ("general perplexity (never trained on)", [f"{arm['general_ppl']:.2f}" for arm in arms.values()]),
        ("general perplexity, times that before", ["", *(f"x {general_loss(arms, name) + 1:.2f}" for name in others)]),
    ]
    return Table(["", *arms], [[name, *cells] for name, cells in rows])


def how_measured(arms: Mapping[str, Arm]) -> str:
    """In a line, on how much."""
    base = arms["base"]
    return (
        f"{base['num_questions']} questions; perplexities over {base['general_tokens']:,} general and "
        f"{base['domain_tokens']:,} domain tokens. Lower perplexity is better."
    )


def _learned_and_forgotten(arms: Mapping[str, Arm]) -> Figure:
    points = [
        Point(name, colour, arm["general_ppl"], 100 * arm["fact_recall"], 100 * arm["fact_completion"])
        for colour, (name, arm) in enumerate(arms.items())
    ]
    return Figure(
        plane_chart("facts over general perplexity", points, "perplexity of general text (to the right: forgotten)"),
        "Learned and forgotten",
        "held-out questions answered (ring: training sentences completed)",
        legend((point.name, point.colour) for point in points),
    )


def _sample(arms: Mapping[str, Arm], index: int) -> Table:
    first = arms["base"]["answers"][index]
    answers = {name: arm["answers"][index] for name, arm in arms.items()}
    rows: list[list[Cell]] = [
        [name, answer["answer"] or "(nothing)", "✓" if answer["right"] else "✗"] for name, answer in answers.items()
    ]
    return Table(["model", f"{first['question']} Expected: {first['expected']}", "right"], rows)
