"""Packed documents: positions, masks and attention against plain references."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.model.attention import SDPAttention, causal_attention, document_mask, window_mask

starts = st.integers(1, 12).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3)
)


@settings(deadline=None)
@given(starts)
def test_document_mask_matches_its_definition(rows):
    doc_start = torch.tensor(rows)
    position_ids, mask = document_mask(doc_start)
    assert position_ids.dtype == torch.int64
    for b, row in enumerate(rows):
        document, position = 0, -1
        documents = []
        for i, start in enumerate(row):
            if start and i:
                document, position = document + 1, -1
            position += 1
            documents.append(document)
            assert position_ids[b, i] == position
        for i in range(len(row)):
            for j in range(len(row)):
                allowed = j <= i and documents[i] == documents[j]
                assert allowed == (j <= i if mask is None else bool(mask[b, 0, i, j]))


def test_no_mask_only_where_every_row_is_one_document():
    doc_start = torch.zeros(2, 5, dtype=torch.bool)
    assert document_mask(doc_start)[1] is None
    doc_start[:, 0] = True
    assert document_mask(doc_start)[1] is None
    doc_start[1, 3] = True
    assert document_mask(doc_start)[1].shape == (2, 1, 5, 5)
    assert doc_start[:, 0].all()  # the argument is not changed


@pytest.mark.parametrize("window", [1, 3, 7, 8, None])
@pytest.mark.parametrize("packed", [False, True])
def test_window_mask_matches_its_definition(window, packed):
    doc_start = torch.zeros(1, 8, dtype=torch.bool)
    doc_start[0, 3] = packed
    mask = window_mask(document_mask(doc_start)[1], 8, window, torch.device("cpu"))
    for i in range(8):
        for j in range(8):
            same = not packed or (i < 3) == (j < 3)
            allowed = j <= i and same and (window is None or i - j < window)
            assert allowed == (j <= i if mask is None else bool(mask[0, 0, i, j]))


def reference(query, key, value, mask):
    """softmax(q k^T / sqrt(d)) v in fp64, head by head."""
    s, b, n, d = query.shape
    groups = key.shape[2]
    out = torch.empty(s, b, n, d, dtype=torch.float64)
    for head in range(n):
        group = head * groups // n
        for row in range(b):
            scores = query[:, row, head].double() @ key[:, row, group].double().T / d**0.5
            allowed = torch.ones(s, s).tril().bool() if mask is None else mask[row, 0]
            weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
            out[:, row, head] = weights @ value[:, row, group].double()
    return out.flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_and_its_gradients_match_the_reference(groups, packed):
    generator = torch.Generator().manual_seed(0)
    s, b, n, d = 17, 2, 6, 5

    def draw(heads):
        return torch.randn(s, b, heads, d, generator=generator).requires_grad_()

    query, key, value = draw(n), draw(groups), draw(groups)
    doc_start = torch.zeros(b, s, dtype=torch.bool)
    doc_start[0, 6] = doc_start[1, 2] = packed
    mask = document_mask(doc_start)[1]
    attention = SDPAttention(types.SimpleNamespace(), 1, None, "self")
    out = attention(query, key, value, mask)
    upstream = torch.randn(out.shape, generator=generator)
    actual = torch.autograd.grad(out, (query, key, value), upstream)
    expected_out = reference(query, key, value, mask)
    expected = torch.autograd.grad(expected_out, (query, key, value), upstream.double())
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=1e-5)
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 128, 129, 300, 1100])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_in_blocks_is_attention_at_once(length, packed):
    generator = torch.Generator().manual_seed(length)
    doc_start = torch.zeros(2, length, dtype=torch.bool)
    doc_start[1, length // 3] = doc_start[0, length // 2] = packed
    mask = document_mask(doc_start)[1]
    tensors = [torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    query, key, value = (tensor.requires_grad_() for tensor in tensors)
    whole = mask if mask is not None else torch.ones(length, length, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=whole)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, tensors, upstream)
    found = causal_attention(query, key, value, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, tensors, upstream), gradients)
