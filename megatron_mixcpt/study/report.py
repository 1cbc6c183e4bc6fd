"""study.json for programs, study.html and study.md for people: the trade, the table of arms, and every run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_mixcpt.config.history import flat
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.ledger import ledger
from megatron_mixcpt.evaluate.ledger_report import answered
from megatron_mixcpt.evaluate.stored import from_rows
from megatron_mixcpt.files import write_json
from megatron_mixcpt.observe.run_data import Run, read_run
from megatron_mixcpt.report.figures import legend
from megatron_mixcpt.report.page import COLOURS, Cell, Figure, Page, Table, Text
from megatron_mixcpt.study.cells import Cell as StudyRun
from megatron_mixcpt.study.figure import Curve, Mark, trade_chart
from megatron_mixcpt.study.outcome import Choice, Mean, Outcome, front, mean, outcome
from megatron_mixcpt.study.status import Standing
from megatron_mixcpt.units import duration, number

MEASURES = {
    "domain": ("gained, nats a token", "{:+.3f}"),
    "forgetting": ("forgotten, nats a token", "{:+.3f}"),
    "tasks": ("tasks", "{:+.1%}"),
    "facts": ("facts right", "{:.1%}"),
    "both": ("fact and skill right", "{:.1%}"),
}
GAINS = {
    "domain": "fall of the loss on domain sources, nats a token",
    "facts": "questions whose fact is right, %",
    "both": "questions with fact and skill right, %",
}
PARTS_OF_BOTH = ("GCI, domain", "GCI, general")  # of the same questions as "GCI, both"
PAIRED = (
    "Each arm less the one with the highest mean gain within the rule, over the seeds that both have (±: 95 % "
    "interval). Runs of a seed on one mixture see the same data in the same order, so much of chance falls out."
)
FORGOTTEN = "largest rise of the loss on any other source, nats a token"


def write_report(now: Standing) -> None:
    """Write study.json, study.html and study.md into the study's folder, from what has been measured so far."""
    out = now.cells.out
    content = describe(now)
    write_json(out / "study.json", content)
    total, ended = now.cells.num_runs, now.num_ended
    cut = "" if ended == total else f" Not complete: {ended} of {total} runs are done."
    page = Page(out.name, f"Learned and forgotten of {len(now.cells.study.arms)} arms, from {now.cells.base}.{cut}")
    if any(now.outcomes.values()):
        page.figures("", _figures(now))
        page.section("Arms, as the rule chose", Text(_rule(now)), _arms(now))
        if _to_best(now):
            page.section(f"Difference from {_best(now)}, seed by seed", Text(PAIRED), _against(now))
    page.section("What differs between the arms", _differences(now))
    page.section("Every run", _runs(now, content["runs"]))
    page.write(out / "study.html")


def describe(now: Standing) -> dict[str, Any]:
    """Everything that was found, as study.json holds it."""
    cells = now.cells
    return {
        "study": cells.study.model_dump(mode="json"),
        "complete": now.num_ended == cells.num_runs and not now.failed,
        "base": {"path": str(cells.base), "measured": _without_items(cells.base_measured)},
        "arms": {
            arm: {
                **(now.chosen[arm]._asdict() if arm in now.chosen else dict.fromkeys(Choice._fields)),
                "over_seeds": {
                    name: {"mean": value.value, "half_width": value.half, "seeds": count}
                    for name, (value, count) in _means(now, arm).items()
                },
            }
            for arm in cells.study.arms
        },
        "best": _best(now),
        "from_best": {
            arm: {
                name: {"mean": value.value, "half_width": value.half, "seeds": count}
                for name, (value, count) in found.items()
            }
            for arm, found in _to_best(now).items()
        },
        "runs": [_describe_run(now, cell) for cell in now.runs],
    }


def _describe_run(now: Standing, cell: StudyRun) -> dict[str, Any]:
    cells = now.cells
    name = cell.folder.name
    told: dict[str, Any] = {"arm": cell.arm, "lr": cell.lr, "seed": cell.seed, "folder": name}
    if name in now.failed:
        return told | {"failed": now.failed[name]}
    told["by_alpha"] = {
        alpha: {
            **now.outcomes[name][float(alpha)],
            "ledger": _ledger(cells.measured_file(cell), cells.base_file, alpha),
            "measured": _without_items(rows),
        }
        for alpha, rows in now.measured.get(name, {}).items()
    }
    run = _read(cell)
    if run is not None:
        told |= {
            "tokens": run.tokens,
            "seconds": round(run.seconds(), 1),
            "peak_gib": max(run.values("mem/peak_gib"), default=None),
        }
    return told


def _read(cell: StudyRun) -> Run | None:
    try:
        return read_run(cell.run_dir)
    except ConfigError:  # it has not begun
        return None


def _without_items(rows: dict[str, Any]) -> dict[str, Any]:
    """Scores alone: the answers stay in the run's own file."""
    return {part: values for part, values in rows.items() if part in ("sources", "tasks", "gci")}


@cache
def _ledger(measured: Path, base: Path, alpha: str) -> list[dict[str, Any]]:
    """Kept, because its intervals take long and what a file holds at an alpha never changes."""
    rows = json.loads(measured.read_text())[alpha]
    before, after = answered(from_rows(json.loads(base.read_text())["1"])), answered(from_rows(rows))
    return [dataclasses.asdict(entry) for entry in ledger(before, after) if entry.group is None] if before else []


def _by_seed(now: Standing, arm: str) -> dict[int, Outcome]:
    """Of what the rule chose."""
    if arm not in now.chosen:
        return {}
    cells, choice = now.cells, now.chosen[arm]
    runs = [cells.cell(arm, choice.lr, seed) for seed in cells.study.seeds]
    return {run.seed: one for run in runs if (one := now.of(run, choice.alpha)) is not None}


def _means(now: Standing, arm: str) -> dict[str, tuple[Mean, int]]:
    """Of what the rule chose, over the seeds that are measured."""
    found = list(_by_seed(now, arm).values())
    return {
        name: (mean([one[name] for one in found]), len(found))
        for name in MEASURES
        if found and all(name in one for one in found)
    }


def _best(now: Standing) -> str | None:
    """The arm with the highest mean gain of those within the rule and with the most seeds, two at least."""
    gain = now.cells.study.choose.gain
    found = {arm: one[gain] for arm in now.chosen if now.chosen[arm].within and gain in (one := _means(now, arm))}
    most = max([2, *(count for _, count in found.values())])
    return max((arm for arm in found if found[arm][1] == most), key=lambda arm: found[arm][0].value, default=None)


def _to_best(now: Standing) -> dict[str, dict[str, tuple[Mean, int]]]:
    """Each arm less the best one, seed by seed: means over the seeds that both have, two at least."""
    best = _best(now)
    if best is None:
        return {}
    of_best, differences = _by_seed(now, best), {}
    for arm in now.chosen:
        pairs = [(one, of_best[seed]) for seed, one in _by_seed(now, arm).items() if seed in of_best]
        if arm != best and len(pairs) > 1:
            known = [name for name in MEASURES if all(name in one and name in other for one, other in pairs)]
            differences[arm] = {
                name: (mean([one[name] - other[name] for one, other in pairs]), len(pairs)) for name in known
            }
    return differences


def _rule(now: Standing) -> str:
    rule = now.cells.study.choose
    limits = [
        f"{number(value)} {unit}"
        for value, unit in (
            (rule.within.forgetting, "nats a token forgotten"),
            (None if rule.within.tasks is None else 100 * rule.within.tasks, "points of the tasks' accuracy lost"),
        )
        if value is not None
    ]
    among = f"of those with at most {' and '.join(limits)} " if limits else ""
    those = "runs and their averages with the base" if rule.averages and now.cells.study.average else "runs"
    return (
        f"The rule, fixed beforehand: of the first seed's {those} {among}"
        f"the one with the highest gain ({GAINS[rule.gain]})"
        + (", and where there is none the one that forgets least (marked ✗)" if limits else "")
        + ". ±: 95 % interval over seeds (Student's t)."
    )


def _known(now: Standing) -> list[str]:
    """Measures that some run has."""
    return [name for name in MEASURES if any(name in one for by in now.outcomes.values() for one in by.values())]


def _arms(now: Standing) -> Table:
    known = _known(now)
    base = outcome(now.cells.base_measured, now.cells.base_measured)
    told = [MEASURES[name][1].format(base[name]) if name in ("facts", "both") else None for name in known]
    rows: list[list[Cell]] = [["base", None, None, None, *told]]
    for arm in now.cells.study.arms:
        means = _means(now, arm)
        told_choice: list[Cell] = [None, None]
        if choice := now.chosen.get(arm):
            told_choice = [f"{choice.lr:g}{'' if choice.within else ' ✗'}", f"{choice.alpha:g}"]
        seeds = max((count for _, count in means.values()), default=0)
        told = [means[name][0].told(MEASURES[name][1]) if name in means else None for name in known]
        rows.append([arm, *told_choice, str(seeds), *told])
    return Table(["arm", "learning rate", "alpha", "seeds", *(MEASURES[name][0] for name in known)], rows)


def _against(now: Standing) -> Table:
    known, differences = _known(now), _to_best(now)
    rows: list[list[Cell]] = []
    for arm, found in differences.items():
        told = [found[name][0].told(_signed(MEASURES[name][1])) if name in found else None for name in known]
        rows.append([arm, str(max(count for _, count in found.values())), *told])
    return Table(["arm", "seeds", *(MEASURES[name][0] for name in known)], rows)


def _signed(form: str) -> str:
    return form if "+" in form else form.replace(":", ":+")


def _differences(now: Standing) -> Table:
    cells = now.cells
    configs = {arm: cells.sweep(arm)[0].config for arm in cells.study.arms}
    settings = {arm: flat(config.model_dump(mode="json", by_alias=True)) for arm, config in configs.items()}
    rows: list[list[Cell]] = []
    for key in dict.fromkeys(key for values in settings.values() for key in values):
        found = [None if values.get(key) in ({}, []) else values.get(key) for values in settings.values()]
        if key not in ("run_dir", "wandb.name", "train.lr") and any(value != found[0] for value in found):
            texts = [None if value is None else str(value) for value in found]
            if key == "data.mix":
                paths = [Path(config.data.mix).absolute() for config in configs.values()]
                common = Path(os.path.commonpath(paths))
                texts = [str(path.relative_to(common)) for path in paths]
            rows.append([key, *texts])
    return Table(["setting", *settings], rows)


def _runs(now: Standing, described: Sequence[dict[str, Any]]) -> Table:
    known = _known(now)
    rows: list[list[Cell]] = []
    for run in described:
        head = [run["arm"], f"{run['lr']:g}", str(run["seed"])]
        cost: list[Cell] = [
            number(run["tokens"], 3) if "tokens" in run else None,
            duration(run["seconds"]) if "seconds" in run else None,
            f"{run['peak_gib']:.1f}" if run.get("peak_gib") else None,
        ]
        by_alpha = run.get("by_alpha", {})
        if not by_alpha:
            state = f"failed: {run['failed']}" if "failed" in run else "to come"
            rows.append([*head, "1", *[None] * (len(known) + 1), *cost, state])
        for alpha in sorted(by_alpha, key=float, reverse=True):
            found = by_alpha[alpha]
            values = [MEASURES[name][1].format(found[name]) if name in found else None for name in known]
            flipped = [entry for entry in found["ledger"] if entry["task"] not in PARTS_OF_BOTH]
            lost, learned = (sum(entry[key] for entry in flipped) for key in ("num_lost", "num_learned"))
            flips = f"{lost} / {learned}" if found["ledger"] else None
            rows.append([*head, alpha, *values, flips, *(cost if alpha == "1" else [None] * 3), ""])
    measures = [MEASURES[name][0] for name in known]
    head = ["arm", "learning rate", "seed", "alpha", *measures, "answers lost / learned"]
    return Table([*head, "tokens", "time", "GiB", "note"], rows)


def _figures(now: Standing) -> list[Figure]:
    gain = now.cells.study.choose.gain
    wanted = list(dict.fromkeys([gain, "domain", "facts"]))
    return [figure for name in wanted if (figure := _figure(now, name)) is not None]


def _figure(now: Standing, gain: str) -> Figure | None:
    scale, unit = (1.0, "") if gain == "domain" else (100.0, " %")
    curves: list[tuple[str, Curve]] = []
    points: list[tuple[float, float]] = []
    for index, arm in enumerate(now.cells.study.arms):

        def mark(cell: StudyRun, alpha: float) -> Mark | None:
            found = now.of(cell, alpha)
            if found is None or gain not in found or "forgetting" not in found:
                return None
            weight = "" if alpha == 1.0 else f", average at {alpha:g}"
            x, y = found["forgetting"], scale * found[gain]
            points.append((x, y))
            return Mark(f"{cell}{weight}: {y:.3g}{unit}, forgotten {x:.3f}", x, y)

        sweep = sorted(now.cells.sweep(arm), key=lambda cell: cell.lr)
        ran = [(found, cell) for cell in sweep if (found := mark(cell, 1.0))]
        alphas = sorted(now.cells.study.average)
        averages = [[found for alpha in alphas if (found := mark(cell, alpha))] for _, cell in ran]
        means = _means(now, arm)
        middle = None
        if gain in means and "forgetting" in means:
            x, y = means["forgetting"][0], means[gain][0]
            error = None if x.half is None or y.half is None else (x.half, scale * y.half)
            middle = Mark(f"{arm}, mean of {means[gain][1]} seeds", x.value, scale * y.value, error)
        if ran:
            curves.append((arm, Curve(index % COLOURS, [found for found, _ in ran], averages, middle)))
    if not curves or not all(map(math.isfinite, (value for point in points for value in point))):
        return None
    chart = trade_chart(f"{gain} over forgetting", [curve for _, curve in curves], front(points), FORGOTTEN, unit)
    keys = legend((arm, curve.colour) for arm, curve in curves)
    return Figure(chart, "Gained and forgotten" if gain == "domain" else "Questions and forgetting", GAINS[gain], keys)


def outcome_words(found: Outcome) -> str:
    """An outcome in a line."""
    return ", ".join(f"{MEASURES[name][0]} {MEASURES[name][1].format(value)}" for name, value in found.items())
