"""Attention over packed documents against all its scores, forward and backward, in fp64 and lower precision."""

import itertools
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.attention import core as module
from megatron_mixcpt.attention.core import DocumentAttention, attention, attention_in_blocks, attention_on_cuda
from megatron_mixcpt.attention.cpu import attention_on_cpu
from megatron_mixcpt.attention.documents import QUERIES, Documents
from megatron_mixcpt.attention.groups import Gathered, Slice, plan_calls
from megatron_mixcpt.attention.reference import dense_attention, dense_mask

starts = st.integers(1, 12).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3)
)
# Lengths of the documents of each row, which are padded with one last document.
ROWS = {
    "odd": [[5, 1, 1, 17, 3], [9, 8]],
    "single tokens": [[1] * 20, [1, 1, 30]],
    "one document": [[40], [40]],
    "one document and padding": [[39], [40]],
    "padding alone": [[], [40]],
    "one row": [[3, 31, 4]],
    "long": [[700, 3, 900, 60, 61, 62, 63], [1, 1100]],
}


def starts_of(rows):
    length = max(max(sum(row) for row in rows), 40)
    doc_start = torch.zeros(len(rows), length, dtype=torch.bool)
    doc_start[:, 0] = True
    for row, lengths in enumerate(rows):
        for end in itertools.accumulate(lengths):
            if end < length:
                doc_start[row, end] = True
    return doc_start


def draw(doc_start, n, g, d, dtype=torch.float64, seed=0):
    b, s = doc_start.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(s, b, n, d), (s, b, g, d), (s, b, g, d), (s, b, n, d)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(function, tensors):
    query, key, value, upstream = tensors
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def reference(doc_start, tensors, window=None, scale=None):
    mask = dense_mask(doc_start, window)
    return with_gradients(lambda q, k, v: dense_attention(q, k, v, mask, scale), [x.double() for x in tensors])


@settings(deadline=None)
@given(starts)
def test_positions_spans_and_sums_match_their_definition(rows):
    doc_start = torch.tensor(rows)
    documents = Documents.of(doc_start)
    spans, position_ids = documents.spans.tolist(), documents.position_ids()
    assert position_ids.dtype == torch.int64
    found = [(row, query + i) for row, query, queries, _, _ in spans for i in range(queries)]
    assert found == [(b, i) for b in range(len(rows)) for i in range(len(rows[0]))]
    for row, query, queries, key, keys in spans:
        assert (query, queries) == (key, keys)
        assert query == 0 or doc_start[row, query]
        assert not doc_start[row, query + 1 : query + queries].any()
        assert position_ids[row, query : query + queries].tolist() == list(range(queries))
    ends = list(itertools.accumulate(documents.spans[:, QUERIES].tolist(), initial=0))
    sums = documents.cu_queries.tolist()
    assert sums == ends + [ends[-1]] * (len(sums) - len(ends))
    assert torch.equal(documents.cu_queries, documents.cu_keys)
    assert (len(sums) - 1).bit_count() == 1
    assert documents.are_rows == (not doc_start[:, 1:].any())


def test_memory_is_in_proportion_to_the_row():
    for count in (1, 4096):
        doc_start = torch.zeros(1, 1 << 17, dtype=torch.bool)
        doc_start[0, :: doc_start.shape[1] // count] = True
        documents = Documents.of(doc_start)
        calls = plan_calls(documents, None, 1.0)
        tensors = [x for call in calls for x in vars(call).values() if isinstance(x, torch.Tensor)]
        numbers = documents.spans.size + documents.cu_queries.numel() + sum(x.numel() for x in tensors)
        assert numbers < 8 * doc_start.numel()


@pytest.mark.parametrize("function", [attention_on_cpu, attention_in_blocks])
@pytest.mark.parametrize("window", [None, 1, 3, 16, 513])
@pytest.mark.parametrize("name", ROWS)
def test_attention_and_its_gradients_match_all_scores(name, window, function):
    doc_start = starts_of(ROWS[name])
    tensors = draw(doc_start, 4, 2, 8)
    documents = Documents.of(doc_start)
    found = with_gradients(lambda q, k, v: function(q, k, v, documents, window, 0.4), tensors)
    for ours, exact in zip(found, reference(doc_start, tensors, window, 0.4)):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n, g", [(1, 1), (6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("d", [4, 5, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_any_number_and_size_cost_no_more_precision_than_their_type(n, g, d, dtype):
    doc_start = starts_of(ROWS["odd"])
    tensors = draw(doc_start, n, g, d, dtype)
    documents, mask = Documents.of(doc_start), dense_mask(doc_start)
    found = with_gradients(lambda q, k, v: attention(q, k, v, documents), tensors)
    plain = with_gradients(lambda q, k, v: dense_attention(q, k, v, mask), tensors)
    for ours, dense, exact in zip(found, plain, reference(doc_start, tensors)):
        assert ours.dtype == dtype
        bound = 2 * (dense.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (ours.double() - exact).norm() <= bound


def test_strided_arguments_are_taken():
    doc_start = starts_of(ROWS["odd"])
    query, key, value, _ = draw(doc_start, 4, 2, 8)
    documents = Documents.of(doc_start)
    expected = attention(query, key, value, documents)
    mixed = torch.cat([query, key, value], dim=2)
    parts = mixed.split([4, 2, 2], dim=2)
    assert torch.equal(attention(*parts, documents), expected)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in parts]
    torch.testing.assert_close(attention(*turned, documents), expected)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.sampled_from([0.1, 1.0, 9.0]))
def test_every_token_is_in_one_call(lengths, heads):
    doc_start = starts_of([lengths])
    documents = Documents.of(doc_start)
    seen = torch.zeros(doc_start.numel() + 1)
    for call in plan_calls(documents, None, heads):
        touched = torch.zeros_like(seen)
        call.put_queries(touched, call.take_queries(torch.ones(doc_start.shape[1], 1)))
        seen += touched
    assert (seen[:-1] == 1).all()


def test_many_short_documents_do_not_cost_a_call_each():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 40, 400).tolist()
    calls = plan_calls(Documents.of(starts_of([lengths])), None, 9.0)
    assert len(calls) < 20
    padded = sum(len(call.queries_from) if isinstance(call, Gathered) else call.queries for call in calls)
    assert padded < 1.3 * sum(lengths)
    assert all(isinstance(call, Slice) for call in plan_calls(Documents.of(starts_of([[900, 1000]])), None, 9.0))


def test_the_core_attention_of_a_layer_is_windowed_attention():
    doc_start = starts_of(ROWS["odd"])
    query, key, value, _ = draw(doc_start, 4, 2, 8)
    documents = Documents.of(doc_start)
    core = DocumentAttention(types.SimpleNamespace(), 1, None, "self", window=3)
    expected = dense_attention(query, key, value, dense_mask(doc_start, 3))
    torch.testing.assert_close(core(query, key, value, None, packed_seq_params=documents), expected.flatten(2))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("d", [4, 8])
def test_a_gpu_is_asked_for_the_same_attention(monkeypatch, groups, window, d):
    """With PyTorch's function replaced by one that reads its arguments as its documentation says."""

    def old(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert query.shape[2] % 8 == 0 and query.shape[1] == key.shape[1]
        assert cu_q.dtype == cu_k.dtype == torch.int32
        out = torch.empty_like(query)
        for a, b, x, y in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
            assert b - a <= max_q and y - x <= max_k
            if a == b:
                continue
            q, k = torch.arange(y - x - (b - a), y - x).unsqueeze(1), torch.arange(y - x)
            left, right = window_size
            near = (k <= q + right) & ((left < 0) | (k >= q - left))
            out[a:b] = dense_attention(
                *(part.unsqueeze(1) for part in (query[a:b], key[x:y], value[x:y])), near[None], scale
            )[:, 0]
        return out

    def new(query, key, value, *args, enable_gqa=False, **options):
        assert enable_gqa
        ratio = query.shape[1] // key.shape[1]
        return old(query, key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1), *args, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new if groups else old)
    module._takes_groups.cache_clear()
    doc_start = starts_of(ROWS["odd"])
    query, key, value, _ = draw(doc_start, 4, 2, d)
    found = attention_on_cuda(query, key, value, Documents.of(doc_start), window, d**-0.5)
    module._takes_groups.cache_clear()
    torch.testing.assert_close(found, dense_attention(query, key, value, dense_mask(doc_start, window)))
