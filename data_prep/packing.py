"""Packing documents into sequences of exactly seq_length tokens, without ever cropping one.

Best-fit decreasing over a histogram of free capacities (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830): documents go longest first, each into the fullest sequence that still has room.
Documents of equal length are placed together, so the work grows with the number of distinct lengths, not of documents.
"""

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Assign every item to a bin of `capacity` tokens.

    Args:
        lengths: int [D], each between 1 and `capacity`.

    Returns:
        int64 [D], the bin of each item, and the number of bins. Equal to placing the items one by one, longest first
        and equal lengths in their order, each into the bin with the least sufficient room.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return np.zeros(0, np.int64), 0
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must be between 1 and {capacity}")
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    bins = np.empty(len(lengths), dtype=np.int64)
    free: dict[int, np.ndarray] = {}  # room -> bins with exactly that room
    rooms = 0  # bit r is set where free[r] is not empty: the least sufficient room is one shift away
    num_bins = 0
    placed = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist()):
        items = order[placed : placed + count]
        placed += count
        while len(items):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                candidates = free.pop(room)
                rooms ^= 1 << room
            else:
                room = capacity
                needed = -(-len(items) // (capacity // length))
                candidates = np.arange(num_bins, num_bins + needed)
                num_bins += needed
            # After one item the same bin is again the tightest fit, as long as another still fits.
            each = room // length
            full = min(len(candidates), len(items) // each)
            rest = 0
            if full < len(candidates):
                rest = len(items) - full * each
            taken = full * each + rest
            bins[items[: full * each]] = np.repeat(candidates[:full], each)
            rooms = _release(free, rooms, room - each * length, candidates[:full])
            if rest:
                bins[items[full * each : taken]] = candidates[full]
                rooms = _release(free, rooms, room - rest * length, candidates[full : full + 1])
                full += 1
            rooms = _release(free, rooms, room, candidates[full:])
            items = items[taken:]
    return bins, num_bins


def _release(free: dict[int, np.ndarray], rooms: int, room: int, bins: np.ndarray) -> int:
    if room == 0 or len(bins) == 0:
        return rooms
    free[room] = np.concatenate([free[room], bins]) if room in free else bins
    return rooms | (1 << room)


def split_lengths(lengths: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut items longer than `limit` into pieces of `limit` and a rest.

    Returns:
        item int64 [P], offset of the piece in its item int64 [P], and length int64 [P], in the order of the items.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // limit)
    item = np.repeat(np.arange(len(lengths)), counts)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else np.zeros(0, np.int64)
    offset = (np.arange(len(item)) - np.repeat(first, counts)) * limit
    return item, offset, np.minimum(lengths[item] - offset, limit)
