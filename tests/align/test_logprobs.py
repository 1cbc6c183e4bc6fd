"""Sums by document: exact, in one order, in memory that does not grow with documents times tokens."""

import pytest
import torch

from megatron_mixcpt.objectives.logprobs import CHUNK, sums_by


@pytest.mark.parametrize("columns", [(), (3,)])
def test_sums_and_gradients_are_those_of_plain_additions_in_fp64(columns):
    generator = torch.Generator().manual_seed(0)
    size = 3 * CHUNK + 17  # documents across chunks, in no order
    groups = torch.randint(-1, 8, (size,), generator=generator)  # -1 and 7 are of no group
    values = torch.randn(size, *columns, generator=generator).requires_grad_()
    found = sums_by(groups, 7, values)
    expected = torch.stack([values[groups == group].double().sum(0) for group in range(7)])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-11)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad((found * weights).sum(), values)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), values)
    assert gradient.dtype == torch.float32 and torch.equal(gradient, expected_gradient)
    assert torch.equal(found, sums_by(groups, 7, values))


def test_memory_does_not_grow_with_documents_times_tokens():
    from benchmarks.lssd_memory import PeakMemory

    def peak(num_tokens):
        groups = torch.arange(num_tokens) * 128 // num_tokens
        values = torch.randn(num_tokens, requires_grad=True)
        with PeakMemory() as memory:
            torch.autograd.grad(sums_by(groups, 128, values).sum(), values)
        return memory.peak

    assert peak(32768) - peak(8192) < 0.05 * 128 * 24576 * 8
