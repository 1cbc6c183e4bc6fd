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
from megatron_mixcpt.parallel import ParallelState


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
    """fp64 sums of `values` `[t]` or `[t, c]` over the entries of each group; one order of addition on any device."""
    member = groups.unsqueeze(0) == torch.arange(num_groups, device=groups.device).unsqueeze(1)  # [groups, t]
    return member.double() @ values.double()
