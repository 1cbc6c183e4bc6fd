"""Hashes of word n-grams: the common ground of near-duplicate search and decontamination.

Words are lower-cased runs of letters and digits, so that layout and punctuation make no difference.
"""

import re

import numpy as np
import xxhash

# Scripts that are written without spaces count by character.
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")
CACHE_WORDS = 1 << 18
BASE = np.uint64(0x9E3779B97F4A7C15)


class NgramHasher:
    """Hashes the n-grams of texts; remembers the hashes of words it has met."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._cache: dict[str, int] = {}

    def hashes(self, text: str) -> np.ndarray:
        """uint64 [number of words - n + 1], one hash for each n-gram in order; empty for shorter texts."""
        words = WORD.findall(text.lower())
        count = len(words) - self.n + 1
        if count <= 0:
            return np.zeros(0, dtype=np.uint64)
        cache = self._cache
        if len(cache) > CACHE_WORDS:
            cache.clear()
        ids = []
        for word in words:
            known = cache.get(word)
            if known is None:
                known = cache[word] = xxhash.xxh3_64_intdigest(word.encode())
            ids.append(known)
        values = np.array(ids, dtype=np.uint64)
        # A polynomial modulo 2^64 in the words' hashes, by Horner's rule over n shifted views.
        total = values[:count].copy()
        for shift in range(1, self.n):
            total *= BASE
            total += values[shift : shift + count]
        return total
