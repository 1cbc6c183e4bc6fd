"""Attention and MLP that keep their input alone and compute the rest again in backward (`train.recompute`).

megatron-core can do this for its MLP and for the core of its attention; here it is the whole of self-attention, and
what is computed again sees the documents of its own micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megatron_mixcpt.adapters.layers import adapters_of
from megatron_mixcpt.model.experts import ExpertLayer
from megatron_mixcpt.model.self_attention import LayerAttention


def _computed_again(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`; backward calls it a second time, with the random numbers of the first."""
    # ALoRA's adapters are told the documents of each micro-batch; by then others have gone through the layer.
    packings = [(adapter, adapter.packing) for adapter in adapters_of(module)]

    def run(x: Tensor) -> Tensor:
        for adapter, packing in packings:
            adapter.packing = packing
        return function(x)

    return tensor_parallel.checkpoint(run, False, x)


class RecomputedAttention(LayerAttention):
    """hidden `[s(/tp), b, h]` -> the same and no bias, as LayerAttention."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        run = super().forward
        return _computed_again(self, lambda x: run(x, *args, **kwargs)[0], hidden_states), None


class RecomputedMLP(MLP):
    """hidden `[s(/tp), b, h]` -> the same and no bias, as MLP."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        run = super().forward
        return _computed_again(self, lambda x: run(x, *args, **kwargs)[0], hidden_states), None


class RecomputedExperts(ExpertLayer):
    """hidden `[s(/tp), b, h]` -> the same and no bias, as ExpertLayer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        run = super().forward
        return _computed_again(self, lambda x: run(x, *args, **kwargs)[0], hidden_states), None
