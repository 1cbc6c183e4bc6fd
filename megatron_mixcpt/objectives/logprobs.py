"""Log-probabilities of chosen tokens from hidden states, over vocabulary shards, with memory that does not grow.

Only the rows of tokens that count go through the output head, a chunk at a time; no logits are gathered or kept.

Shapes: s sequence, b micro-batch, h hidden, v vocabulary, tp tensor-parallel size, t tokens that count.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_mixcpt.kernels import linear_lssd_loss
from megatron_mixcpt.runtime.parallel import ParallelState

CHUNK = 1024  # entries that are summed at once


class TokenLogProbs:
    """`(hidden, head, labels, targets) -> log-probabilities [t]` for one model shard, with gradient."""

    def __init__(self, state: ParallelState, vocab_start: int, vocab_size: int) -> None:
        group = state.tensor_group if state.tensor_size > 1 else None
        self._options: dict[str, Any] = {"group": group, "vocab_start": vocab_start, "valid_vocab": vocab_size}

    def __call__(self, hidden: Tensor, head: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """hidden `[s(/tp), b, h]`, head `[v/tp, h]`, labels `[b, s]`, targets `[t]` places in `[s, b]`, flat.

        Returns fp32 `[t]`; 0 where the label is ignored.
        """
        if hidden.shape[0] != labels.shape[1]:
            # The loss sums the hidden states' gradient over the ranks; here it only has to be split again.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets)
        nll = linear_lssd_loss(rows, head, None, None, labels.t().reshape(-1)[targets], **self._options)
        assert isinstance(nll, Tensor)
        return -nll


def sums_by(groups: Tensor, num_groups: int, values: Tensor) -> Tensor:
    """fp64 sums of `values` `[t]` or `[t, c]` over the entries of each group; one order of addition on any device.

    Memory beyond the result is that of a chunk, in backward too.
    """
    return _SumsBy.apply(groups, num_groups, values)


class _SumsBy(torch.autograd.Function):
    """Products with the 0/1 matrix of memberships, chunk by chunk: scattered additions have no fixed order on a GPU."""

    @staticmethod
    def forward(ctx: Any, groups: Tensor, num_groups: int, values: Tensor) -> Tensor:
        ctx.save_for_backward(groups)
        ctx.dtype = values.dtype
        sums = torch.zeros(num_groups, *values.shape[1:], dtype=torch.float64, device=values.device)
        for part, added in zip(groups.split(CHUNK), values.split(CHUNK)):
            sums += _members(part, num_groups) @ added.double()
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        (groups,) = ctx.saved_tensors
        parts = [_members(part, len(gradient)).t() @ gradient for part in groups.split(CHUNK)]
        return None, None, torch.cat(parts).to(ctx.dtype)


def _members(groups: Tensor, num_groups: int) -> Tensor:
    """fp64 `[groups, t]`: 1 where an entry is of the group."""
    return (groups.unsqueeze(0) == torch.arange(num_groups, device=groups.device).unsqueeze(1)).double()
