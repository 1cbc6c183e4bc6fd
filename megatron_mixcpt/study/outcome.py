"""What a run learned and forgot, in a few numbers, and the rule that chooses by them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_mixcpt.evaluate.comparison import change
from megatron_mixcpt.evaluate.stored import from_rows
from megatron_mixcpt.study.config import ChooseConfig

Outcome = dict[str, float]
"""What could be measured of: `domain` (fall of the loss on domain sources) and `forgetting` (largest rise on any
other), nats a token; `tasks`, change of the mean accuracy; `facts` and `both`, shares of the questions."""

NAMES = {"domain_gain": "domain", "general_forgetting": "forgetting", "task_change": "tasks"}
ROUNDING = 1e-9  # 7/20 - 8/20 is below -0.05
# Two-sided 95 % quantiles of Student's t by degrees of freedom, 1 to 9.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def outcome(rows: Mapping[str, Any], base: Mapping[str, Any]) -> Outcome:
    """Of the measurements of a model and of the base's."""
    model, before = from_rows(rows), from_rows(base)
    found = {NAMES[name]: value for name, value in change({"model": model, "base": before}).items()}
    for score in model["gci"]:
        if score.skill == "all" and score.score in ("domain", "both"):
            found["facts" if score.score == "domain" else "both"] = score.value
    return found


class Choice(NamedTuple):
    """Of an arm: a learning rate, the share of the run in its average with the base (1: the run itself), and whether
    it lies within what the rule allows."""

    lr: float
    alpha: float
    within: bool


def chosen(rule: ChooseConfig, sweep: Mapping[tuple[float, float], Outcome]) -> Choice | None:
    """What the rule chooses of outcomes by learning rate and alpha; None where nothing was measured.

    Of equal gains it takes the smaller learning rate, then the larger alpha.
    """
    open_to_choice = {key: one for key, one in sweep.items() if rule.averages or key[1] == 1.0}
    if not open_to_choice:
        return None
    within = {key: one for key, one in open_to_choice.items() if is_within(rule, one)}
    if within:
        best = max(within, key=lambda key: (within[key].get(rule.gain, -math.inf), -key[0], key[1]))
        return Choice(*best, within=True)
    least = min(open_to_choice, key=lambda key: (open_to_choice[key].get("forgetting", math.inf), key[0], -key[1]))
    return Choice(*least, within=False)


def is_within(rule: ChooseConfig, one: Outcome) -> bool:
    """Whether an outcome costs no more than the rule allows."""
    limits = rule.within
    forgotten = limits.forgetting is not None and one.get("forgetting", math.inf) > limits.forgetting + ROUNDING
    return not forgotten and (limits.tasks is None or one.get("tasks", -math.inf) >= -limits.tasks - ROUNDING)


@dataclass(frozen=True)
class Mean:
    """Over seeds. `half`: half the width of its 95 % interval (Student's t); None of a single one."""

    value: float
    half: float | None

    def told(self, form: str) -> str:
        return form.format(self.value) + (f" ± {form.format(self.half).lstrip('+')}" if self.half is not None else "")


def mean(values: Sequence[float]) -> Mean:
    """Of at least one value."""
    if len(values) == 1:
        return Mean(values[0], None)
    free = len(values) - 1
    t = STUDENT_T[free - 1] if free <= len(STUDENT_T) else 1.96 + 2.37 / free + 2.82 / free**2  # within 0.2 %
    return Mean(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (forgetting, gain): those that no other beats in both, by forgetting."""
    kept: list[tuple[float, float]] = []
    for forgetting, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not kept or gain > kept[-1][1]:
            kept.append((forgetting, gain))
    return kept
