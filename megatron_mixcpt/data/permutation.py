"""A pseudo-random order of any length that is computed, not stored."""

from __future__ import annotations

import struct

import xxhash

ROUNDS = 6


def permuted(index: int, size: int, key: int) -> int:
    """Element `index` of the permutation of `range(size)` that belongs to `key` (64 bits).

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). Takes no memory and no time to set up, whatever the size, and is the same for
    every version of every library.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(ROUNDS):
            mixed = xxhash.xxh3_64_intdigest(struct.pack("<QQB", right, key, round_))
            left, right = right, left ^ (mixed & mask)
        index = left << half | right
        if index < size:
            return index
