"""Exact scoring of short answers."""

from __future__ import annotations

import re
from collections.abc import Sequence


def contains_answer(text: str, expected: str) -> bool:
    """Whether `expected` occurs in `text` as whole words, ignoring case: `otter` is not found in `otters`."""
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", text, re.IGNORECASE) is not None


def recall(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that contain what was expected. Raises ValueError if lengths differ or nothing was asked."""
    if not expected or len(answers) != len(expected):
        raise ValueError(f"{len(answers)} answers for {len(expected)} questions")
    return sum(map(contains_answer, answers, expected)) / len(expected)
