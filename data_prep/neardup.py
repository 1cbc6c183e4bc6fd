"""Near-duplicates: MinHash signatures (rensa) in the workers, banding and a check of each candidate at the end.

Two records are near-duplicates if the share of equal signature entries, an unbiased estimate of the Jaccard similarity
of their word n-grams (Broder 1997), reaches the threshold. Of each group of near-duplicates the first record stays.
"""

import numpy as np

from megatron_mixcpt.data_prep.config import NearDuplicates
from megatron_mixcpt.data_prep.ngrams import NgramHasher

SEED = 20240410


def algorithm() -> str:
    """What signatures depend on beside the configuration."""
    import rensa

    return f"rensa-rminhash-{rensa.RMinHash.ALGORITHM_VERSION}-{SEED}"


class Signer:
    """Makes MinHash signatures of texts."""

    def __init__(self, settings: NearDuplicates) -> None:
        self._permutations = settings.permutations
        self._hasher = NgramHasher(settings.ngram)
        self._short = NgramHasher(1)

    def signatures(self, texts: list[str]) -> np.ndarray:
        """uint32 [len(texts), permutations]. A text with fewer words than an n-gram is represented by its words."""
        import rensa

        sets = []
        for text in texts:
            hashes = self._hasher.hashes(text)
            sets.append(hashes if len(hashes) else self._short.hashes(text))
        ends = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
        flat = np.concatenate([*sets, np.zeros(0, np.uint64)])
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, self._permutations, SEED)
        return np.array(matrix.to_rows(), dtype="<u4").reshape(len(texts), self._permutations)


def choose_bands(permutations: int, threshold: float) -> tuple[int, int]:
    """(bands, rows) with bands * rows <= permutations, such that a pair at the threshold meets in some band with a
    probability of at least 95 %, and as few others as possible do."""
    best = (permutations, 1)
    for rows in range(1, permutations + 1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.95:
            best = (bands, rows)
    return best


def near_duplicates(signatures: list[np.ndarray], rows: list[np.ndarray], threshold: float) -> np.ndarray:
    """Which records repeat an earlier one. bool [R], R the total length of `rows`.

    Args:
        signatures: uint32 [n_i, permutations] arrays; mapped files stay on disk, one band is held at a time.
        rows: for each array the rows that count as records, in order.
    """
    offsets = np.cumsum([0, *map(len, rows)])
    parent = np.arange(offsets[-1])
    if not len(parent):
        return np.zeros(0, dtype=bool)
    bands, width = choose_bands(signatures[0].shape[1], threshold)
    for band in range(bands):
        columns = slice(band * width, (band + 1) * width)
        keys = np.concatenate([_band_keys(block[:, columns][mine]) for block, mine in zip(signatures, rows)])
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        later, earlier = order[1:][same], order[:-1][same]
        for begin in range(0, len(later), 1 << 14):
            a, b = later[begin : begin + (1 << 14)], earlier[begin : begin + (1 << 14)]
            alike = (_gather(signatures, rows, offsets, a) == _gather(signatures, rows, offsets, b)).mean(axis=1)
            for first, second in zip(a[alike >= threshold].tolist(), b[alike >= threshold].tolist()):
                _unite(parent, first, second)
    return np.array([_root(parent, index) != index for index in range(len(parent))], dtype=bool)


def _gather(signatures: list[np.ndarray], rows: list[np.ndarray], offsets: np.ndarray, index: np.ndarray) -> np.ndarray:
    block = np.searchsorted(offsets, index, side="right") - 1
    return np.stack([signatures[b][rows[b][i - offsets[b]]] for b, i in zip(block.tolist(), index.tolist())])


def _band_keys(columns: np.ndarray) -> np.ndarray:
    keys = np.zeros(len(columns), dtype=np.uint64)
    for column in columns.T:
        keys = (keys + column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _root(parent: np.ndarray, index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index


def _unite(parent: np.ndarray, first: int, second: int) -> None:
    a, b = _root(parent, first), _root(parent, second)
    parent[max(a, b)] = min(a, b)  # the smallest index is the root: it stays
