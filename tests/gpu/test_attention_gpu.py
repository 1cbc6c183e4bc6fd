"""Attention over packed documents on a GPU, forward and backward, against all its scores in fp64."""

import itertools

import pytest
import torch

from megatron_mixcpt.attention.core import attention
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.attention.reference import dense_attention, dense_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = {
    "documents": [[5, 1, 17, 300, 3], [9, 8, 309]],
    "single tokens": [[1] * 64],
    "one document": [[40], [40]],
    "long": [[700, 3, 900, 60, 61]],
}
LARGEST = {torch.bfloat16: 0.02, torch.float32: 1e-5}  # error, as a share of the largest value, or of 1


def starts_of(rows):
    doc_start = torch.zeros(len(rows), sum(rows[0]), dtype=torch.bool)
    for row, lengths in enumerate(rows):
        doc_start[row, [0, *itertools.accumulate(lengths[:-1])]] = True
    return doc_start


def with_gradients(function, tensors):
    *inputs, upstream = (x.detach() for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("n", "g", "d"), [(4, 4, 64), (6, 2, 64), (4, 1, 128), (2, 2, 4)])
@pytest.mark.parametrize("rows", ROWS)
def test_attention_and_its_gradients_are_those_of_the_documents(rows, n, g, d, window, dtype):
    doc_start = starts_of(ROWS[rows])
    b, s = doc_start.shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(s, b, n, d), (s, b, g, d), (s, b, g, d), (s, b, n, d)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    documents = Documents.of(doc_start).map_tensors(lambda tensor: tensor.cuda())
    found = with_gradients(lambda *qkv: attention(*qkv, documents, window=window), [x.cuda() for x in tensors])
    mask = dense_mask(doc_start, window)
    expected = with_gradients(lambda *qkv: dense_attention(*qkv, mask), [x.double() for x in tensors])
    for ours, right in zip(found, expected):
        assert ours.dtype == dtype
        error = (ours.cpu().double() - right).abs().max() / max(right.abs().max(), 1.0)
        assert error <= LARGEST[dtype]
