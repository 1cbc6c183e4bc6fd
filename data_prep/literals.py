"""Counting control strings that stand in ordinary text, e.g. a web page that spells out `<|endoftext|>`."""

import re
from collections.abc import Callable, Iterable


def literal_counter(control: Iterable[str]) -> Callable[[str], int]:
    """A function that counts occurrences of any of the control strings in a text, quick where there are none."""
    strings = sorted({text for text in control if text}, key=len, reverse=True)
    if not strings:
        return lambda text: 0
    pattern = re.compile("|".join(map(re.escape, strings)))
    # Most control strings share a few openings such as "<|"; a plain search for those rules nearly every text out.
    openings = sorted({text[:2] for text in strings})

    def count(text: str) -> int:
        if not any(opening in text for opening in openings):
            return 0
        return sum(1 for _ in pattern.finditer(text))

    return count
