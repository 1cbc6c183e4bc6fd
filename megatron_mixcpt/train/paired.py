"""How much a loss has risen, item by item: the same held-out items before and after, so that their differences in
difficulty, which are most of the variance, do not count as noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rise:
    """Of the mean loss a token."""

    mean: float
    noise: float
    """Standard error over the items."""


def rise(before: Sequence[float], now: Sequence[float], tokens: Sequence[float]) -> Rise:
    """From each item's summed loss, before and now, and its number of tokens (0: the item does not count).

    The mean is a ratio of two sums; its standard error is that of the residuals (linearised), for items drawn at
    random. A single item says nothing about it: infinite.
    """
    total = sum(tokens)
    if total == 0:
        return Rise(0.0, math.inf)
    mean = sum(b - a for a, b in zip(before, now)) / total
    residuals = [b - a - mean * n for a, b, n in zip(before, now, tokens) if n]
    if len(residuals) < 2:
        return Rise(mean, math.inf)
    variance = sum(r * r for r in residuals) * len(residuals) / (len(residuals) - 1)
    return Rise(mean, math.sqrt(variance) / total)
