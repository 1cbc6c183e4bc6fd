"""What adapters of linear layers and of experts have in common: their matrices, and this rank's part of them."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mixcpt.adapters.layout import AdaptedLinear
from megatron_mixcpt.architecture.layout import Place
from megatron_mixcpt.attention.documents import Documents


class Adapter(nn.Module):
    """What is added to the output of one linear layer.

    Attributes:
        enabled: off, the layer is the base model's own.
        packing: the documents of the micro-batch; the layer's hook sets it.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(self, layout: AdaptedLinear, config: TransformerConfig, place: Place) -> None:
        super().__init__()
        self.layout, self.settings, self.place = layout, layout.config, place
        self.enabled = True
        self.packing: Documents | None = None
        for name, (_, axis) in layout.tensors().items():
            local = torch.empty(
                layout.local_shape(name, place), dtype=config.params_dtype, device=torch.cuda.current_device()
            )
            parameter = nn.Parameter(local)
            if axis is not None:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            self.register_parameter(name, parameter)

    @property
    def scale(self) -> float:
        return self.settings.alpha / self.settings.rank

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill with the starting values, the same on every grid."""
        for name in self.layout.tensors():
            self.fill(name, self.layout.initial(name, seed))

    @torch.no_grad()
    def fill(self, name: str, whole: Tensor) -> None:
        """Take this rank's part of a whole tensor."""
        self.get_parameter(name).copy_(self.layout.shard(name, whole, self.place))

    def dropped(self, x: Tensor, *, parts: bool) -> Tensor:
        """x with dropout. `parts`: ranks hold different parts of it and draw differently; else they draw alike."""
        if not self.training or self.settings.dropout == 0.0:
            return x
        with get_cuda_rng_tracker().fork() if parts else contextlib.nullcontext():
            return F.dropout(x, self.settings.dropout)
