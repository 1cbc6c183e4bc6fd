"""LoRA beside a linear layer of a mixture's experts: each expert has its own A and B.

Tensor ranks have a part of each expert, and what they make of a token is summed after all of it. So nothing is summed
here on the way forward: of an adapter too each rank adds its part. Of what every rank has all of (A where the layer's
rows are cut, B where its columns are) each computes a part of the gradient; those are summed in backward, one message
a layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mixcpt.adapters.adapter import Adapter
from megatron_mixcpt.adapters.layout import AdaptedLinear
from megatron_mixcpt.architecture.layout import Place

# (x [rows, in], weight [e, out, in], counts [e]) -> [rows, out]: each row times its expert's matrix
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExpertAdapter(Adapter):
    """What is added to the output of one linear layer of the experts."""

    def __init__(self, layout: AdaptedLinear, config: TransformerConfig, place: Place) -> None:
        super().__init__(layout, config, place)
        for parameter in self.parameters():  # as of the experts themselves
            parameter.allreduce = place.experts == 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor, counts: Tensor, product: Product) -> Tensor:
        """The layer's input `[rows, in(/tp)]`, the rows of one expert after those of another, `counts` int64 `[e]` of
        each, -> `[rows, out(/tp)]`. `product`: the layer's own."""
        down, up = self.down, self.up
        if self.layout.row_parallel:
            up = copy_to_tensor_model_parallel_region(up)
        else:
            down = copy_to_tensor_model_parallel_region(down)
        # Every tensor rank has the same x before linear_fc1, and its own columns of it before linear_fc2.
        z = product(self.dropped(x, parts=self.layout.row_parallel), down, counts) * self.scale  # [rows, P * r]
        if not self.layout.gated:
            return product(z, up, counts)
        halves = zip(z.chunk(2, dim=-1), up.unbind(1))  # gate and up
        return torch.cat([product(half, matrix, counts) for half, matrix in halves], dim=-1)
