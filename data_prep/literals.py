"""Counting control strings that stand in ordinary text, e.g. a web page that spells out `<|endoftext|>`."""

import re
from collections.abc import Callable, Iterable


def literal_counter(control: Iterable[str]) -> Callable[[list[str]], int]:
    """A function that counts occurrences of any of the control strings in texts, quick where there are none."""
    strings = sorted({text for text in control if text}, key=len, reverse=True)
    if not strings:
        return lambda texts: 0
    pattern = re.compile("|".join(map(re.escape, strings)))
    # Most control strings share a few openings such as "<|"; a plain search for those rules nearly every text out.
    openings = sorted({text[:2] for text in strings})

    def count(texts: list[str]) -> int:
        suspects = {index for opening in openings for index, text in enumerate(texts) if opening in text}
        return sum(1 for index in suspects for _ in pattern.finditer(texts[index]))

    return count
