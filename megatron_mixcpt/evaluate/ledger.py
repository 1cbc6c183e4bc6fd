"""The ledger of what was lost and learned: which answers went from right to wrong and back, against the base model.

An average hides it: a model can lose as many answers as it learns. Where there are answers to choose from, some of them
change because both models guess. With c the chance of guessing right, and each model guessing for itself, the shares of
the items that went right -> wrong (RW), wrong -> right (WR), and were wrong twice (WW), are

    RW = lost (1 - c) + guessed      WR = learned (1 - c) + guessed      WW = neither (1 - c)^2

with guessed = neither c (1 - c) = WW c / (1 - c). Two models of one family guess alike, which makes that less, and it
is never more than RW and WR. So the smallest of the three is taken out: lost and learned are lower bounds, where all
changes that guessing can explain are explained by it, and learned - lost holds in any case. Item-level forgetting:
arXiv 2510.17776.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mixcpt.errors import ConfigError

RESAMPLED, SEED = 2000, 0
LOW, HIGH = 2.5, 97.5  # percentiles of a 95 % interval


@dataclass(frozen=True)
class Item:
    """One question as one model answered it."""

    task: str
    group: str
    """Skill or source within the task; the task itself where it has none."""
    id: str
    question: str
    expected: str
    answer: str
    right: bool
    sure: float | None = None
    """Of its answer. Where it chose, how far the log-probability of its choice lies above the next, in nats; where it
    wrote, the mean log-probability of the tokens. None where it is not known."""
    chance: float = 0.0
    """Of guessing right."""


@dataclass(frozen=True)
class Flip:
    """An item that one of the models has right and the other wrong."""

    base: Item
    model: Item

    @property
    def lost(self) -> bool:
        return self.base.right


@dataclass(frozen=True)
class Estimate:
    """A share of the items, adjusted for chance, with its paired bootstrap interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """What was lost and learned of one task, or of one group of it."""

    task: str
    group: str | None
    """None: all of the task."""
    count: int
    num_lost: int
    num_learned: int
    lost: Estimate
    learned: Estimate
    change: Estimate
    """learned minus lost."""


def flips(base: Sequence[Item], model: Sequence[Item]) -> list[Flip]:
    """Items whose answers differ in being right: those lost first, and the surest that the base model was first.

    Raises ConfigError where the models were not asked the same.
    """
    found = [Flip(b, m) for b, m in _paired(base, model) if b.right != m.right]
    return sorted(found, key=lambda flip: (not flip.lost, math.inf if flip.base.sure is None else -flip.base.sure))


def ledger(base: Sequence[Item], model: Sequence[Item]) -> list[Entry]:
    """One entry for each task, followed by its groups where there are several. Raises as `flips`."""
    pairs = _paired(base, model)
    entries = []
    for task in dict.fromkeys(b.task for b, _ in pairs):
        of_task = [pair for pair in pairs if pair[0].task == task]
        entries.append(_entry(task, None, of_task))
        groups = list(dict.fromkeys(b.group for b, _ in of_task))
        if len(groups) > 1:
            entries += [_entry(task, group, [pair for pair in of_task if pair[0].group == group]) for group in groups]
    return entries


def _paired(base: Sequence[Item], model: Sequence[Item]) -> list[tuple[Item, Item]]:
    answers = {(item.task, item.id): item for item in model}
    missing = [item for item in base if (item.task, item.id) not in answers]
    if missing or len(base) != len(model):
        name = f"{missing[0].task} {missing[0].id}" if missing else "some items"
        raise ConfigError(f"the models were not asked the same questions ({name}): measure both with the same options")
    return [(item, answers[item.task, item.id]) for item in base]


def _entry(task: str, group: str | None, pairs: Sequence[tuple[Item, Item]]) -> Entry:
    chance = np.array([b.chance for b, _ in pairs])
    before, after = (np.array([item.right for item in items]) for items in zip(*pairs))
    lost, learned = (before & ~after) / (1 - chance), (~before & after) / (1 - chance)
    guessed = (~before & ~after) * chance / (1 - chance) ** 2
    terms = np.stack([lost, learned, lost * (chance > 0), learned * (chance > 0), guessed])  # [5, items]
    generator = np.random.default_rng(SEED)
    # One by one: all of them at once would take RESAMPLED times the memory.
    drawn = [_shares(terms[:, generator.integers(0, len(pairs), len(pairs))]) for _ in range(RESAMPLED)]
    low, high = np.percentile(drawn, [LOW, HIGH], axis=0)
    estimates = (Estimate(*map(float, three)) for three in zip(_shares(terms), low, high))
    return Entry(task, group, len(pairs), int((before & ~after).sum()), int((~before & after).sum()), *estimates)


def _shares(terms: np.ndarray) -> np.ndarray:
    """(lost, learned, learned - lost) of what `_entry` sums: changes, those that can be guessed, and guessing."""
    lost, learned, *guessing = terms.mean(axis=1)
    return np.array([lost, learned, learned]) - np.array([min(guessing), min(guessing), lost])
