"""Runs of a tensor's elements as boxes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixcpt.checkpoint.boxes import SMALL, Box, Piece

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def piece(sizes, begin=7, offset=10):
    """At `offset` along each axis of a larger tensor, and from element `begin` of the parameter on."""
    shape, offsets = tuple(offset + size + 3 for size in sizes), (offset,) * len(sizes)
    return Piece(Box("key", shape, offsets, sizes, begin, begin + math.prod(sizes), False), True)


@given(SHAPES, st.data())
def test_boxes_are_the_elements_in_their_order(sizes, data):
    own = piece(sizes)
    count = math.prod(sizes)
    begin = data.draw(st.integers(0, 7 + count + 3))
    end = data.draw(st.integers(begin, 7 + count + 5))
    whole = np.full(own.box.shape, -1)
    whole[tuple(slice(10, 10 + size) for size in sizes)] = np.arange(7, 7 + count).reshape(sizes)
    found = []
    for box in own.boxes(begin, end):
        place = tuple(slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes))
        values = whole[place].ravel().tolist()
        assert values == list(range(box.begin, box.end))
        found += values
    assert found == list(range(max(begin, 7), min(end, 7 + count)))
    assert len(list(own.boxes(begin, end))) <= 2 * len(sizes) - 1  # few entries in the index


@pytest.mark.parametrize("sizes", [(1, 700, 31), (300, 128), (64, 300), (SMALL,), (5, 9), (3, SMALL)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_equal_values_are_shared_out_whole_and_once(sizes, ranks):
    own = piece(sizes)
    for number in range(ranks):
        shares = [own.share(number, rank, ranks) for rank in range(ranks)]
        elements = [position for begin, end in shares for position in range(begin, end)]
        assert elements == list(range(own.box.begin, own.box.end))
        assert all(len(list(own.boxes(*share))) <= 1 for share in shares)


def test_small_pieces_spread_over_the_ranks():
    holders = [rank for number in range(4) for rank in range(4) if len(set(piece((5,)).share(number, rank, 4))) == 2]
    assert holders == [0, 1, 2, 3]
