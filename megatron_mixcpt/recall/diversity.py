"""How different the samples are from each other: distinct n-grams, and what the prompts are about."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.ngrams import WORD, NgramHasher

MOST_TEXTS = 5000  # looked at: the share of distinct n-grams falls with the amount of text, so compare equal amounts
NGRAMS = (1, 2, 3, 4)
DIMENSIONS = 1024
MOST_CLUSTERS, TEXTS_A_CLUSTER = 12, 8
ROUNDS = 25
NAMED_WORDS = 4


def distinct_ngrams(texts: list[str]) -> dict[str, float]:
    """Share of the word n-grams in the first MOST_TEXTS texts that are different, for n of 1 to 4."""
    shares = {}
    for n in NGRAMS:
        hasher = NgramHasher(n)
        hashes = np.concatenate([*(hasher.hashes(text) for text in texts[:MOST_TEXTS]), np.zeros(0, np.uint64)])
        shares[str(n)] = len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0
    return shares


def clusters(prompts: list[str], seed: int) -> dict[str, Any]:
    """Spherical k-means over hashed words weighted by their rarity: `groups` (share, typical words, an example each,
    largest first) and `effective`, the exponential of the entropy of their shares."""
    prompts = prompts[:MOST_TEXTS]
    count = min(MOST_CLUSTERS, len(prompts) // TEXTS_A_CLUSTER)
    if count < 2:
        return {"groups": [], "effective": 0.0}
    words = [[word.lower() for word in WORD.findall(prompt)] for prompt in prompts]
    frequency = Counter(word for some in words for word in set(some))
    rarity = {word: math.log(len(prompts) / n) for word, n in frequency.items()}
    vectors = np.zeros((len(prompts), DIMENSIONS))
    hasher = NgramHasher(1)
    for row, some in zip(vectors, words):
        for word in set(some):
            row[int(hasher.hashes(word)[0] % np.uint64(DIMENSIONS))] += rarity[word]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = _k_means(vectors, count, np.random.default_rng(seed))
    groups = []
    for number in range(count):
        mine = np.flatnonzero(place == number)
        if len(mine):
            inside = Counter(word for i in mine for word in set(words[i]))
            typical = sorted(inside, key=lambda word: (-inside[word] / len(mine) * rarity[word], word))
            centre = vectors[mine].mean(0)
            example = prompts[mine[int((vectors[mine] @ centre).argmax())]]
            groups.append({"share": len(mine) / len(prompts), "words": typical[:NAMED_WORDS], "example": example})
    groups.sort(key=lambda group: -group["share"])
    entropy = -sum(group["share"] * math.log(group["share"]) for group in groups)
    return {"groups": groups, "effective": math.exp(entropy)}


def _k_means(vectors: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    centres = vectors[generator.choice(len(vectors), count, replace=False)]
    place = np.zeros(len(vectors), dtype=np.int64)
    for _ in range(ROUNDS):
        place = (vectors @ centres.T).argmax(1)
        moved = np.stack([vectors[place == i].sum(0) if (place == i).any() else centres[i] for i in range(count)])
        moved /= np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
        if np.allclose(moved, centres):
            break
        centres = moved
    return place
