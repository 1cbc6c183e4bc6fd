"""Parts of whole tensors: where a rank's elements lie in them, as boxes that a checkpoint can store.

A rank's parameter is a part of a whole tensor, or two (gate and up lie side by side in one). Any run of its elements,
as the distributed optimizer holds them, is a few boxes of it: a part of the first row, whole rows, a part of the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

SMALL = 1 << 14  # elements; a piece below goes to one rank whole, since every box costs an entry of the index


@dataclass(frozen=True)
class Box:
    """`offsets[i] : offsets[i] + sizes[i]` of the whole tensor `key`, which are elements `begin:end` of a parameter."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor, vocabulary padding included."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int
    end: int
    padded: bool
    """The stored tensor may have fewer rows (vocabulary padding); what is missing is zero."""


@dataclass(frozen=True)
class Piece:
    """A part of a parameter of this rank that is one box of a whole tensor, in row-major order."""

    box: Box
    stored_here: bool
    """False where other tensor- or pipeline-parallel ranks have the same values and store them."""

    def boxes(self, begin: int, end: int) -> Iterator[Box]:
        """Elements `begin:end` of the parameter, as far as they lie in this piece, in their order."""
        own = self.box
        begin, end = max(begin, own.begin), min(end, own.end)
        position = begin
        for offsets, sizes in _runs(own.sizes, begin - own.begin, end - own.begin):
            count = math.prod(sizes)
            place = tuple(first + offset for first, offset in zip(own.offsets, offsets))
            yield Box(own.key, own.shape, place, sizes, position, position + count, own.padded)
            position += count

    def share(self, number: int, rank: int, ranks: int) -> tuple[int, int]:
        """Elements `begin:end` that fall to `rank` of `ranks` with equal values: rows of it, or all of a small one.

        Args:
            number: of the piece among all, so that the small ones spread.
        """
        own = self.box
        count = own.end - own.begin
        rows = next((size for size in own.sizes if size > 1), 1)
        if count < SMALL or rows < ranks:
            return (own.begin, own.end) if number % ranks == rank else (own.begin, own.begin)
        row = count // rows
        return own.begin + rows * rank // ranks * row, own.begin + rows * (rank + 1) // ranks * row


def pieces_of(sharded: ShardedTensor | ShardedTensorFactory) -> list[Piece]:
    """The pieces of a parameter, from what megatron-core says of its place; `sharded.data` is the parameter."""
    parameter: Tensor = sharded.data
    parts = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
    pieces = []
    for part in parts:
        assert part.data.is_contiguous() and len(part.replica_id) == 3, f"{part}: of a kind that is not known here"
        begin = part.data.storage_offset() - parameter.data.storage_offset()
        sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        box = Box(
            part.key,
            tuple(part.global_shape),
            tuple(part.global_offset),
            sizes,
            begin,
            begin + math.prod(sizes),
            part.allow_shape_mismatch,
        )
        pieces.append(Piece(box, tuple(part.replica_id[:2]) == (0, 0)))
    return pieces


def _runs(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the boxes that elements `begin:end` of a row-major array make up, in their order."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = begin // row, (end - 1) // row
    if first == last and (begin % row or end % row or shape[0] == 1):
        for offsets, sizes in _runs(shape[1:], begin - first * row, end - first * row):
            yield (first, *offsets), (1, *sizes)
        return
    whole, after = -(-begin // row), end // row
    if begin % row:
        yield from _runs(shape, begin, whole * row)
    if whole < after:
        yield (whole, *(0 for _ in shape[1:])), (after - whole, *shape[1:])
    if end % row:
        yield from _runs(shape, max(after * row, begin), end)
