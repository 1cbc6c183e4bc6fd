"""LoRA and ALoRA beside Megatron's linear layers, with tensor and sequence parallelism.

    z = A x                                   rank r for each projection of the layer
    a = z                                     LoRA (https://arxiv.org/abs/2106.09685)
    a = W_o attention(W_qkv z) (+ z)          ALoRA: causal multi-head attention, within packed documents
    y = W x + alpha / r * B a

ALoRA is our reading of the abstract of https://arxiv.org/abs/2405.17830, which states a multi-head attention module
upon LoRA that lets information of preceding tokens reach the current one; its equations were not at hand.

B starts at zero, so a model with fresh adapters is the base model. A column-parallel layer has all of A and the
attention on every tensor rank and shards B as its own weight; a row-parallel one shards A, sums z over the ranks and
has all of B. In between, z and a hold the whole sequence on every rank: r values a token, where the layer's own
communication moves `hidden`.

Shapes: s sequence, b batch, P projections of the layer, r rank, n heads; s/tp under sequence parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mixcpt.adapters.adapter import Adapter
from megatron_mixcpt.adapters.experts import ExpertAdapter
from megatron_mixcpt.adapters.layout import AdaptedLinear
from megatron_mixcpt.architecture.layout import Place
from megatron_mixcpt.attention.core import attention


class LinearAdapter(Adapter):
    """What is added to the output of one linear layer.

    `forward(x)`: the layer's input `[s(/tp), b, in(/tp)]` -> `[s(/tp), b, out(/tp)]`, shaped like its output.
    """

    attention_in: nn.Parameter
    attention_out: nn.Parameter
    rows: Tensor | None  # of the layer's output that are adapted; None: all
    member: Tensor | None  # [rows, P] 1 where a row belongs to a projection; None: there is one only

    def __init__(
        self, layout: AdaptedLinear, config: TransformerConfig, place: Place, window: int | None = None
    ) -> None:
        super().__init__(layout, config, place)
        self.window = window
        self.sequence_parallel = config.sequence_parallel
        for name, parameter in self.named_parameters():
            # What sees a part of the sequence only: finalize_model_grads sums such gradients over the group.
            partial = name == ("up" if layout.row_parallel else "down")
            parameter.sequence_parallel = config.sequence_parallel and partial  # type: ignore[attr-defined]
        owners = layout.row_targets()
        if layout.gated:
            owners = torch.cat([half.chunk(place.tensors)[place.tensor] for half in owners.chunk(2)])
        elif not layout.row_parallel:
            owners = owners.chunk(place.tensors)[place.tensor]
        self.out_features = len(owners)
        rows = (owners >= 0).nonzero().flatten()
        every, device = len(rows) == len(owners), self.down.device
        self.register_buffer("rows", None if every else rows.to(device), persistent=False)
        member = F.one_hot(owners[rows], layout.projections).to(device, config.params_dtype)  # [rows, P]
        self.register_buffer("member", member if layout.projections > 1 else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        row_parallel = self.layout.row_parallel
        x = self.dropped(x, parts=self.sequence_parallel or row_parallel)
        z = F.linear(x, self.down)  # [s(/tp), b, P * r]
        if row_parallel:
            z = reduce_from_tensor_model_parallel_region(z)
        elif self.sequence_parallel:
            # What follows is computed alike on every rank, up to `copy_to` below.
            z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=False)
        a = self._mixed(z) if self.settings.method == "alora" else z  # [s, b, P * r]
        a = a * self.scale
        if not row_parallel:
            a = copy_to_tensor_model_parallel_region(a)
        elif self.sequence_parallel:
            a = scatter_to_sequence_parallel_region(a)
        return F.linear(a, self.up_matrix())

    def up_matrix(self) -> Tensor:
        """B as one matrix `[out(/tp), P * r]`: each row is zero but for the columns of its own projection."""
        up = self.up.flatten(0, -2)
        if self.member is not None:
            up = (up.unsqueeze(1) * self.member.unsqueeze(2)).flatten(1)
        if self.rows is not None:
            up = up.new_zeros(self.out_features, up.shape[1]).index_copy(0, self.rows, up)
        return up

    def _mixed(self, z: Tensor) -> Tensor:
        """ALoRA: causal attention over z within each document. z `[s, b, P * r]`; so is the result."""
        s, b, _ = z.shape
        count, rank, heads = self.layout.projections, self.settings.rank, self.settings.num_heads
        flat = z.view(s * b, count, rank).transpose(0, 1)  # [P, s * b, r]
        qkv = torch.bmm(flat, self.attention_in.transpose(1, 2))  # [P, s * b, 3 * r]
        qkv = qkv.view(count, s, b, 3, heads, rank // heads).permute(3, 1, 2, 0, 4, 5)  # [3, s, b, P, n, r / n]
        query, key, value = qkv.reshape(3, s, b, count * heads, rank // heads)
        assert self.packing is not None
        mixed = attention(query, key, value, self.packing, window=self.window)
        mixed = mixed.reshape(s * b, count, rank).transpose(0, 1)
        a = torch.bmm(mixed, self.attention_out.transpose(1, 2))
        if self.settings.residual:
            a = a + flat
        return a.transpose(0, 1).reshape(s, b, count * rank)


class AdaptableColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel layer with room for an adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: LinearAdapter | None = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return _with_adapter(self.adapter, input_, output), bias


class AdaptableRowLinear(RowParallelLinear):
    """Megatron's row-parallel layer with room for an adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: LinearAdapter | None = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return _with_adapter(self.adapter, input_, output), bias


def _with_adapter(adapter: LinearAdapter | None, x: Tensor, output: Tensor) -> Tensor:
    return output + adapter(x) if adapter is not None and adapter.enabled else output


def new_adapter(
    layout: AdaptedLinear, config: TransformerConfig, place: Place, window: int | None = None
) -> LinearAdapter | ExpertAdapter:
    """Its values are not yet filled in. `window`: of the model, which ALoRA's attention keeps to."""
    if layout.experts:
        return ExpertAdapter(layout, config, place)
    return LinearAdapter(layout, config, place, window)


def attach(model: nn.Module, linears: list[AdaptedLinear], first_layer: int, place: Place, window: int | None) -> None:
    """Put the adapters of this stage beside its layers and freeze everything else.

    Args:
        model: a stage whose layers are `model.decoder.layers`, with base weights or yet without.
        linears: of the whole model.
        first_layer: number of layers on earlier stages.
        place: of this rank.
        window: the model's sliding window, which ALoRA's attention keeps to.
    """
    model.requires_grad_(False)
    layers: Any = model.get_submodule("decoder.layers")
    by_layer: dict[int, list[Adapter]] = {}
    for layout in linears:
        _, _, number, rest = layout.linear.split(".", 3)
        index = int(number) - first_layer
        if 0 <= index < len(layers):
            adapter = new_adapter(layout, model.config, place, window)  # type: ignore[arg-type]
            layers[index].get_submodule(rest).adapter = adapter
            by_layer.setdefault(index, []).append(adapter)
    for index, adapters in by_layer.items():
        if adapters[0].settings.method == "alora":
            layers[index].register_forward_pre_hook(_PackingHook(adapters), with_kwargs=True)


class _PackingHook:
    """Hands each layer's documents to its adapters. The layer's, not the model's: under recomputation a layer runs
    again when the model has gone on to other micro-batches."""

    def __init__(self, adapters: list[Adapter]) -> None:
        self.adapters = adapters

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for adapter in self.adapters:
            adapter.packing = kwargs["packed_seq_params"]


def adapters_of(model: nn.Module) -> list[Adapter]:
    """The adapters of this stage, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Adapter)]


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model for as long as the context is open."""
    adapters = adapters_of(model)
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
