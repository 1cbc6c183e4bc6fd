"""Which of the scored records are taken: from one end of a column, no response or prompt twice, sources balanced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranking(table: dict[str, np.ndarray], column: str, order: str, seed: int) -> np.ndarray:
    """Rows from the best to the worst, int64; rows without a value are left out.

    Args:
        table: equally long columns.
        column: which of them decides; empty for a random order.
    """
    shuffled = np.random.default_rng(seed).permutation(len(table["source"]))  # decides ties, too
    if not column:
        return shuffled
    values = table[column].astype(np.float64)
    rows = shuffled[np.isfinite(values[shuffled])]
    sign = 1.0 if order == "low" else -1.0
    return rows[np.argsort(sign * values[rows], kind="stable")]


def pick(ranked: np.ndarray, sources: np.ndarray, texts: Sequence[tuple[str, str]], count: int) -> np.ndarray:
    """At most `count` rows of `ranked`, in its order.

    Each source gives an equal share; what one cannot give, the others do. A record whose prompt or whose response (up
    to case and white space) was taken already is passed over.

    Args:
        sources: name of each row's source.
        texts: (prompt, response) of each row.
    """
    seen: set[tuple[int, str]] = set()
    queues: dict[str, list[int]] = {str(name): [] for name in np.unique(sources[ranked])}
    for row in ranked.tolist():
        keys = {(side, " ".join(text.lower().split())) for side, text in enumerate(texts[row])}
        if not keys & seen:
            seen |= keys
            queues[str(sources[row])].append(row)
    quotas = shares([len(queue) for queue in queues.values()], count)
    taken = {row for queue, quota in zip(queues.values(), quotas) for row in queue[:quota]}
    return np.array([row for row in ranked.tolist() if row in taken], dtype=np.int64)


def shares(available: Sequence[int], count: int) -> list[int]:
    """`count` dealt out evenly, none more than it has: the smallest are emptied, the rest share what is left."""
    quotas = [0] * len(available)
    left = min(count, sum(available))
    order = sorted(range(len(available)), key=lambda i: available[i])
    for position, index in enumerate(order):
        quotas[index] = min(available[index], -(-left // (len(order) - position)) if left else 0)
        left -= quotas[index]
    return quotas
