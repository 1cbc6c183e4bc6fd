"""Self-attention of one layer: megatron-core's, with what layers of a model may differ in."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture


class LayerAttention(SelfAttention):
    """hidden `[s(/tp), b, h]` -> the same and no bias; `rotary_pos_emb` as `rope.Rotary` returns it."""

    def __init__(self, *args: Any, arch: Architecture, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        window = arch.window(self.layer_number - 1)
        self.core_attention.window = window
        local = arch.local_rope_theta is not None and window is not None
        self.rotary_index = int(local)
        # Both queries and keys are multiplied with it where they rotate: here the queries alone, twice.
        factor = 1.0 if local or arch.rope_scaling is None else arch.rope_scaling.attention_factor**2
        self.channels: Tensor | None = None  # fp32 [d]; no buffer, which the model's type would round
        if factor != 1.0:
            rotates = torch.arange(arch.head_dim) < arch.num_rotary_channels
            self.channels = torch.where(rotates, factor, 1.0).to(torch.cuda.current_device())

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if rotary_pos_emb.dim() == 5:
            rotary_pos_emb = rotary_pos_emb[self.rotary_index]
        return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's, queries `[s, b, n, d]` first."""
        query, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self.channels is not None:
            query = (query * self.channels).to(query.dtype)
        return query, *others
