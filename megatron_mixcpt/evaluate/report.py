"""report.json for programs and report.md for people, both from the same measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixcpt.files import write_json, write_whole

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
        forgetting = f"mixcpt did **not** lose less general perplexity than cpt: {amounts}."
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
    plot: str,
) -> None:
    """Write `report.json` (measurements by arm, in their order) and `report.md` into `folder`.

    `settings` are (name, value) lines, `seconds` the parts of the run with their duration, `plot` an image's file name.
    """
    write_json(folder / "report.json", dict(arms))
    write_whole(folder / "report.md", _markdown(arms, title, settings, seconds, plot))


def metrics_table(arms: Mapping[str, Arm]) -> str:
    """The measurements as a Markdown table, one column a model."""
    base = arms["base"]
    rows = [
        ("**facts: held-out questions answered**", [f"**{arms[name]['fact_recall']:.0%}**" for name in arms]),
        ("facts: training sentences completed", [f"{arms[name]['fact_completion']:.0%}" for name in arms]),
        ("answers in the asked format", [f"{arms[name]['format_following']:.0%}" for name in arms]),
        ("domain perplexity (unseen documents)", [f"{arms[name]['domain_ppl']:.2f}" for name in arms]),
        ("**general perplexity** (never trained on)", [f"**{arms[name]['general_ppl']:.2f}**" for name in arms]),
        ("change of the general perplexity", ["", *(_change(general_loss(arms, name)) for name in list(arms)[1:])]),
    ]
    lines = [f"| | {' | '.join(arms)} |", "|---|" + "---:|" * len(arms)]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows]
    lines += [
        "",
        f"{base['num_questions']} questions; perplexities over {base['general_tokens']:,} general and "
        f"{base['domain_tokens']:,} domain tokens. Lower perplexity is better.",
    ]
    return "\n".join(lines)


def _markdown(
    arms: Mapping[str, Arm],
    title: str,
    settings: Sequence[tuple[str, str]],
    seconds: Sequence[tuple[str, float]],
    plot: str,
) -> str:
    samples = [_sample(arms, i) for i in sample_questions(arms["base"])]
    total = sum(value for _, value in seconds)
    return "\n\n".join(
        [
            f"# {title}",
            verdict(arms),
            metrics_table(arms),
            f"![recall of the facts against general perplexity]({plot})",
            "## Three questions, before and after\n\nTaken from fixed places of the list, whatever the answers.",
            *samples,
            "## Settings\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in settings),
            "## Time\n\n| part | seconds |\n|---|---:|\n"
            + "\n".join(f"| {name} | {value:.0f} |" for name, value in seconds)
            + f"\n| **all** | **{total:.0f}** |",
            "One seed and one small domain: this shows the mechanism, it is not a benchmark.\n",
        ]
    )


def _sample(arms: Mapping[str, Arm], index: int) -> str:
    first = arms["base"]["answers"][index]
    lines = [f"**{first['question']}** Expected: *{first['expected']}*", ""]
    for name in arms:
        answer = arms[name]["answers"][index]
        lines.append(f"- {name}: {answer['answer'] or '(nothing)'} {'✓' if answer['right'] else '✗'}")
    return "\n".join(lines)
