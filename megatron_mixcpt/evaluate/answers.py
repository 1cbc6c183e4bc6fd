"""Exact scoring of short answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_mixcpt.data_prep.ngrams import UNSPACED

UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
SPACED = rf"[^\W{UNSPACED}]"


def find_words(text: str, words: str) -> re.Match[str] | None:
    """Where `words` first occur in `text` as whole words, ignoring case: `otter` is not found in `otters`.

    Characters of scripts that are written without spaces (Chinese, Japanese, Thai, Lao) are words of their own.
    """
    begin = "" if UNSPACED_CHARACTER.match(words[:1]) else rf"(?<!{SPACED})"
    end = "" if UNSPACED_CHARACTER.match(words[-1:]) else rf"(?!{SPACED})"
    return re.search(f"{begin}{re.escape(words)}{end}", text, re.IGNORECASE)


def contains_answer(text: str, expected: str) -> bool:
    """Whether `expected` occurs in `text`: see `find_words`."""
    return find_words(text, expected) is not None


def recall(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that contain what was expected. Raises ValueError if lengths differ or nothing was asked."""
    if not expected or len(answers) != len(expected):
        raise ValueError(f"{len(answers)} answers for {len(expected)} questions")
    return sum(map(contains_answer, answers, expected)) / len(expected)
