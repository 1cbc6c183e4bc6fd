"""Best-fit packing against the obvious algorithm."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.data_prep.packing import best_fit, split_lengths


def obvious_best_fit(lengths, capacity):
    """One item at a time, longest first, each into the bin with the least sufficient room."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_best_fit_equals_the_obvious_algorithm(case):
    capacity, lengths = case
    bins, count = best_fit(np.array(lengths, dtype=np.int64), capacity)
    used = np.bincount(bins, weights=lengths, minlength=count) if lengths else np.zeros(0)
    assert sorted((capacity - used).tolist()) == obvious_best_fit(lengths, capacity)


def test_a_realistic_corpus_is_filled():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6, 1, size=100_000).astype(np.int64) + 1, 4096)
    bins, count = best_fit(lengths, 4096)
    assert np.bincount(bins, weights=lengths).max() <= 4096
    assert lengths.sum() / (count * 4096) >= 0.999


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 30))
def test_split_pieces_cover_each_item_once(lengths, limit):
    item, offset, length = split_lengths(np.array(lengths, dtype=np.int64), limit)
    assert length.max(initial=0) <= limit and length.min(initial=1) >= 1
    for i, total in enumerate(lengths):
        mine = item == i
        assert length[mine].sum() == total
        assert offset[mine].tolist() == list(range(0, total, limit))
