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
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mixcpt.adapters.layout import AdaptedLinear, shard
from megatron_mixcpt.attention.core import attention
from megatron_mixcpt.attention.documents import Documents


class Adapter(nn.Module):
    """What is added to the output of one linear layer.

    `forward(x)`: the layer's input `[s(/tp), b, in(/tp)]` -> `[s(/tp), b, out(/tp)]`, shaped like its output.

    Attributes:
        enabled: off, the layer is the base model's own.
        packing: the documents of the micro-batch; the layer's hook sets it.
    """

    down: nn.Parameter
    up: nn.Parameter
    attention_in: nn.Parameter
    attention_out: nn.Parameter
    rows: Tensor | None  # of the layer's output that are adapted; None: all
    member: Tensor | None  # [rows, P] 1 where a row belongs to a projection; None: there is one only

    def __init__(self, layout: AdaptedLinear, config: TransformerConfig, window: int | None = None) -> None:
        super().__init__()
        self.layout, self.settings = layout, layout.config
        self.enabled = True
        self.window = window
        self.packing: Documents | None = None
        self.sequence_parallel = config.sequence_parallel
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        device = torch.cuda.current_device()
        for name, (shape, axis) in layout.tensors().items():
            local = [length // size if axis == index else length for index, length in enumerate(shape)]
            parameter = nn.Parameter(torch.empty(local, dtype=config.params_dtype, device=device))
            if axis is not None:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            # What sees a part of the sequence only: finalize_model_grads sums such gradients over the group.
            partial = name == ("up" if layout.row_parallel else "down")
            parameter.sequence_parallel = config.sequence_parallel and partial  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        owners = layout.row_targets()
        if layout.gated:
            owners = torch.cat([half.chunk(size)[rank] for half in owners.chunk(2)])
        elif not layout.row_parallel:
            owners = owners.chunk(size)[rank]
        self.out_features = len(owners)
        rows = (owners >= 0).nonzero().flatten()
        every = len(rows) == len(owners)
        self.register_buffer("rows", None if every else rows.to(device), persistent=False)
        member = F.one_hot(owners[rows], len(layout.targets)).to(device, config.params_dtype)  # [rows, P]
        self.register_buffer("member", member if len(layout.targets) > 1 else None, persistent=False)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill with the starting values, the same on every grid."""
        for name in self.layout.tensors():
            self.fill(name, self.layout.initial(name, seed))

    @torch.no_grad()
    def fill(self, name: str, whole: Tensor) -> None:
        """Take this rank's part of a whole tensor."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        axis = self.layout.tensors()[name][1]
        self.get_parameter(name).copy_(shard(whole, axis, rank, size))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(self._dropped(x), self.down)  # [s(/tp), b, P * r]
        row_parallel = self.layout.row_parallel
        if row_parallel:
            z = reduce_from_tensor_model_parallel_region(z)
        elif self.sequence_parallel:
            # What follows is computed alike on every rank, up to `copy_to` below.
            z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=False)
        a = self._mixed(z) if self.settings.method == "alora" else z  # [s, b, P * r]
        a = a * (self.settings.alpha / self.settings.rank)
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

    def merged_delta(self) -> Tensor:
        """LoRA: what the adapter adds to this rank's weight, fp32 `[out(/tp), in(/tp)]`."""
        return (self.settings.alpha / self.settings.rank) * (self.up_matrix().float() @ self.down.float())

    def _mixed(self, z: Tensor) -> Tensor:
        """ALoRA: causal attention over z within each document. z `[s, b, P * r]`; so is the result."""
        s, b, _ = z.shape
        count, rank, heads = len(self.layout.targets), self.settings.rank, self.settings.num_heads
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

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.settings.dropout == 0.0:
            return x
        # Where ranks hold different parts of x they draw differently, where they hold the same, alike.
        parts = self.sequence_parallel or self.layout.row_parallel
        with get_cuda_rng_tracker().fork() if parts else contextlib.nullcontext():
            return F.dropout(x, self.settings.dropout)


class AdaptableColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel layer with room for an adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: Adapter | None = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return _with_adapter(self.adapter, input_, output), bias


class AdaptableRowLinear(RowParallelLinear):
    """Megatron's row-parallel layer with room for an adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: Adapter | None = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return _with_adapter(self.adapter, input_, output), bias


def _with_adapter(adapter: Adapter | None, x: Tensor, output: Tensor) -> Tensor:
    return output + adapter(x) if adapter is not None and adapter.enabled else output


def attach(model: nn.Module, linears: list[AdaptedLinear], first_layer: int, window: int | None) -> None:
    """Put the adapters of this stage beside its layers and freeze everything else.

    Args:
        model: a stage whose layers are `model.decoder.layers`, with base weights or yet without.
        linears: of the whole model.
        first_layer: number of layers on earlier stages.
        window: the model's sliding window, which ALoRA's attention keeps to.
    """
    model.requires_grad_(False)
    layers: Any = model.get_submodule("decoder.layers")
    by_layer: dict[int, list[Adapter]] = {}
    for layout in linears:
        _, _, number, rest = layout.linear.split(".", 3)
        index = int(number) - first_layer
        if 0 <= index < len(layers):
            adapter = Adapter(layout, model.config, window)  # type: ignore[arg-type]
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
