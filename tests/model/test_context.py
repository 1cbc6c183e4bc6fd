"""Rows cut over context-parallel ranks: each token on one of them, equal work, and the attention of whole rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.attention import cpu as attention_cpu
from megatron_mixcpt.attention.context import cut, deal
from megatron_mixcpt.attention.core import attention_in_blocks
from megatron_mixcpt.attention.cpu import attention_on_cpu
from megatron_mixcpt.attention.documents import KEYS, QUERIES, Documents
from megatron_mixcpt.attention.reference import dense_attention, dense_mask

LENGTH = 48
rows = st.lists(st.lists(st.integers(1, 47), max_size=6), min_size=1, max_size=3)


def starts_of(documents, length=LENGTH):
    doc_start = torch.zeros(len(documents), length, dtype=torch.bool)
    doc_start[:, 0] = True
    for row, places in enumerate(documents):
        doc_start[row, places] = True
    return doc_start


@settings(deadline=None)
@given(rows, st.sampled_from([1, 2, 3, 4, 16]))
def test_every_token_is_on_one_rank_and_finds_its_way_back(documents, size):
    packing = Documents.of(starts_of(documents))
    b = packing.num_rows
    parts = [cut(packing, rank, size) for rank in range(size)]
    places = np.stack([part[1].numpy() for part in parts])  # [N, b, s / N]
    assert (np.diff(places, axis=2) > 0).all()
    assert (np.sort(places.transpose(1, 0, 2).reshape(b, -1)) == np.arange(LENGTH)).all()
    tokens = torch.arange(LENGTH * b).view(LENGTH, b)
    gathered = torch.cat([tokens.gather(0, part[1].t()) for part in parts]).flatten()
    for part, _ in parts:
        assert torch.equal(gathered[part.cut.from_ranks], tokens.flatten())
        assert torch.equal(tokens.flatten()[part.cut.to_ranks], gathered)


@pytest.mark.parametrize("documents", [[[]], [[1024]], [[3000, 3500]], [list(range(64, 4096, 64))]])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_as_many_tokens_and_much_the_same_to_compute(documents, size):
    packing = Documents.of(starts_of(documents, 4096))
    keys = np.arange(1, 4097) - packing.begins[0]
    loads = [keys[places[0]].sum() for places in deal(packing, size)]
    assert max(loads) < 1.2 * np.mean(loads)


@pytest.mark.parametrize("function", [attention_on_cpu, attention_in_blocks])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("documents", [[[], [7, 8, 30]], [[11, 40], [1]]])
def test_the_parts_of_all_ranks_are_the_attention_of_whole_rows(monkeypatch, documents, window, masked, function):
    # Every rank is given all keys, as if they had been gathered.
    monkeypatch.setattr(attention_cpu, "whole_rows", lambda x, packing: x)
    monkeypatch.setattr(attention_cpu, "summed_part", lambda x, packing: x)
    monkeypatch.setattr("megatron_mixcpt.attention.groups.MASKED", 1 << 20 if masked else 0)
    doc_start = starts_of(documents)
    b, generator = len(documents), torch.Generator().manual_seed(0)
    shapes = [(LENGTH, b, heads, 8) for heads in (4, 2, 2, 4)]
    query, key, value, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    expected = dense_attention(*inputs, dense_mask(doc_start, window), 0.4)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    found, sums = torch.zeros_like(expected), [torch.zeros_like(x) for x in inputs]
    for rank in range(2):
        packing, places = cut(Documents.of(doc_start), rank, 2)
        index = places.t()[..., None, None].expand(-1, -1, 4, 8)
        out = function(query.gather(0, index), key, value, packing, window, 0.4)
        found = found.scatter(0, index, out.detach())
        for total, part in zip(sums, torch.autograd.grad(out, inputs, upstream.gather(0, index))):
            total += part
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(sums, gradients):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_gpu_finds_the_keys_of_every_span():
    packing, _ = cut(Documents.of(starts_of([[], [7, 8, 30]])), 1, 2)
    assert packing.key_order is not None
    sums = packing.cu_keys.tolist()
    assert packing.cu_queries[-1] == 2 * LENGTH // 2
    for (row, _, queries, key, keys), begin, end in zip(packing.spans.tolist(), sums, sums[1:]):
        assert packing.key_order[begin:end].tolist() == list(range(row * LENGTH + key, row * LENGTH + key + keys))
        assert queries <= keys
    assert packing.spans[:, KEYS].sum() > packing.spans[:, QUERIES].sum()
