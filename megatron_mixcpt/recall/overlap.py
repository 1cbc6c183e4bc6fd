"""How much of what was drawn stands in given files, word n-gram by word n-gram.

The samples' n-grams are held in memory and the files streamed past them, so that a corpus of any size can be searched.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_mixcpt.data_prep.decontaminate import evaluation_texts
from megatron_mixcpt.data_prep.ngrams import NgramHasher


def shares_found(texts: Iterable[str], paths: list[str], ngram: int) -> np.ndarray:
    """For each text the share of its word n-grams that stand in the files; fp64, 0 for texts shorter than an n-gram.

    Raises ConfigError for files that cannot be read.
    """
    hasher = NgramHasher(ngram)
    hashes = [hasher.hashes(text) for text in texts]
    known = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]))
    found = np.zeros(len(known) + 1, dtype=bool)  # one more, for n-grams of the files that no sample has
    if len(known):
        for text in evaluation_texts(paths):
            found[_places(known, hasher.hashes(text))] = True
        found[-1] = False
    return np.array([found[_places(known, one)].mean() if len(one) else 0.0 for one in hashes])


def _places(known: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Where each hash stands in `known`; its length for those that do not."""
    at = np.searchsorted(known, hashes)
    there = at < len(known)
    there[there] = known[at[there]] == hashes[there]
    return np.where(there, at, len(known))
