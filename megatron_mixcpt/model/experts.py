"""A mixture of experts in place of a layer's MLP: a router, and many small MLPs of which each token goes through a few.

No token is dropped, whatever the experts' load. Every tensor rank has a part of each expert, as of a dense MLP; with
`parallel.expert` a rank has some of the experts, and tokens go to the ranks that have theirs (dispatch.py).

Shapes: t tokens of this rank, h hidden, e experts, k experts of a token, f FFN of an expert; f/tp under tensor
parallelism, e/r of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mixcpt.adapters.experts import ExpertAdapter
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.model.dispatch import Dispatch
from megatron_mixcpt.model.routing import Routing, choices_of

GROUPED_MULTIPLE = 8  # 16 bytes of bf16
# Compute capability from which on torch's grouped product leaves the gradient of an expert without a token unwritten
# (pytorch#172439, cutlass#2674); no GPU has confirmed it here.
LEAVES_IDLE_UNWRITTEN = (10, 0)


class Router(nn.Module):
    """x `[..., h]` -> (shares fp32 `[..., k]`, experts int64 `[..., k]`): the k most likely experts of each token."""

    def __init__(self, config: TransformerConfig, arch: Architecture) -> None:
        super().__init__()
        self.experts_per_token, self.normalize = arch.experts_per_token, arch.normalize_routing
        self.weight = _uninitialised(config, arch.num_experts, arch.hidden_size)
        # Each rank routes its part of the sequence only: finalize_model_grads sums gradients marked so over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.routing: Routing | None = None
        self.layer = 0  # over the whole model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The product in the weights' type, what follows in fp32: a choice is what transformers would make.
        logits = F.linear(x, self.weight)
        probabilities = logits.softmax(-1, dtype=torch.float32)
        shares, experts = probabilities.topk(self.experts_per_token, dim=-1)
        if self.normalize:
            shares = shares / shares.sum(-1, keepdim=True)
        if self.routing is not None:
            shares = self.routing.observe(self.layer, logits, probabilities, experts, shares)
        return shares, experts


class StackedLinear(nn.Module):
    """One linear layer of every expert: `weight [e, out, in]`, a part of `out` or `in` on each tensor rank. With room
    for an adapter."""

    def __init__(self, config: TransformerConfig, *shape: int, axis: int) -> None:
        """`axis`: of the shape, which tensor ranks share."""
        super().__init__()
        self.weight = _uninitialised(config, *shape)
        # megatron-core then reduces gradients over the ranks with the same experts; their optimizer is another one.
        over_ranks = parallel_state.get_expert_model_parallel_world_size() > 1
        self.weight.allreduce = not over_ranks  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(self.weight, True, axis, 1)
        self.adapter: ExpertAdapter | None = None

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x `[rows, in]`, the rows of one expert after those of another; counts int64 `[e]` -> `[rows, out/tp]`."""
        output = stacked_linear(x, self.weight, counts)
        if self.adapter is None or not self.adapter.enabled:
            return output
        return output + self.adapter(x, counts, stacked_linear)


def stacked_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x `[rows, in]`, the rows of one expert after those of another, weight `[e, out, in]`, counts int64 `[e]` ->
    `[rows, out]`."""
    aligned = all(size % GROUPED_MULTIPLE == 0 for size in weight.shape[1:])
    if x.device.type != "cpu" and x.dtype == torch.bfloat16 and aligned and len(x):
        return grouped_linear(x, weight, counts)
    return sequential_linear(x, weight, counts)


def sequential_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One product an expert, which waits for `counts`: the reference."""
    parts = zip(x.split(counts.tolist()), weight.unbind())
    return torch.cat([F.linear(rows, matrix) for rows, matrix in parts])


class ZeroIdle(torch.autograd.Function):
    """A weight `[e, ...]` as it is; in backward the gradient of experts without a token is 0, whatever stood there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return grad.masked_fill((counts == 0).view(-1, *[1] * (grad.dim() - 1)), 0.0), None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """All experts in one kernel; on a GPU of bf16 alone, in sizes that GROUPED_MULTIPLE divides."""
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= LEAVES_IDLE_UNWRITTEN:
        weight = ZeroIdle.apply(weight, counts)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))


class Experts(MegatronModule):
    """x `[t, h]` and their routing -> `[t, h]`: the shares' sum of what each token's experts make of it.

    Under tensor parallelism the sum over ranks is the result.
    """

    def __init__(self, config: TransformerConfig, arch: Architecture) -> None:
        super().__init__(config)
        self._group = parallel_state.get_expert_model_parallel_group()
        self._num_experts, hidden = arch.num_experts, arch.hidden_size
        experts = arch.num_experts // self._group.size()
        ffn = arch.expert_ffn_size // config.tensor_model_parallel_size
        self.linear_fc1 = StackedLinear(config, experts, 2 * ffn, hidden, axis=1)
        self.linear_fc2 = StackedLinear(config, experts, hidden, ffn, axis=2)

    def forward(self, x: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """shares fp32 `[t, k]`, experts int64 `[t, k]`, as the router gives them."""
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)  # by expert, of one expert by token
        counts = choices_of(experts, self._num_experts)
        rows = x[order // experts.shape[1]]
        if self._group.size() > 1:
            dispatch = Dispatch(counts, self._group)
            rows = dispatch.back(self._computed(dispatch.there(rows), dispatch.counts))
        else:
            rows = self._computed(rows, counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # Token by token, so that the sum does not depend on the order in which a device adds.
        return (rows[back].view(*experts.shape, -1) * shares.unsqueeze(-1)).sum(1).to(x.dtype)

    def _computed(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`[rows, h]`, by expert of this rank, -> the same of what comes out of it. counts int64 `[e/r]`."""
        gate, up = self.linear_fc1(rows, counts).chunk(2, dim=-1)
        return self.linear_fc2(self.config.activation_func(gate) * up, counts)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Under the names and in the shapes of megatron-core's experts: `[(layers,) e, out, in]`."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        ranks, group = self._group.size(), self._group.rank()
        layers, key = len(sharded_offsets), f"{prefix}experts.linear_fc"

        def gate_and_up(key: str, weight: Tensor, *_: Any) -> list[ShardedTensor]:
            # They lie side by side in an expert's matrix here, one above the other in the whole one.
            first = len(weight) * group
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,
                    *sharded_offsets,
                    (layers, first + expert, len(weight) * ranks),
                    (layers + 1, rank + part * size, 2 * size),
                    replica_id=replica,
                    prepend_axis_num=layers + 1,
                )
                for expert, matrix in enumerate(weight)
                for part, half in enumerate(matrix.chunk(2))
            ]

        def merged(halves: list[Tensor]) -> Tensor:
            return torch.cat(halves).view(self.linear_fc1.weight.shape)

        return {
            f"{prefix}linear_fc1.weight": ShardedTensorFactory(
                f"{key}1.weight", self.linear_fc1.weight, gate_and_up, merged, replica
            ),
            f"{prefix}linear_fc2.weight": ShardedTensor.from_rank_offsets(
                f"{key}2.weight",
                self.linear_fc2.weight,
                *sharded_offsets,
                (layers, group, ranks),
                (layers + 2, rank, size),
                replica_id=replica,
                prepend_axis_num=layers,
            ),
        }


class ExpertLayer(MegatronModule):
    """hidden `[s(/tp), b, h]` -> the same and no bias, as megatron-core's MLP."""

    def __init__(self, config: TransformerConfig, arch: Architecture) -> None:
        super().__init__(config)
        self.router = Router(config, arch)
        self.experts = Experts(config, arch)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the layer; counted from 1."""
        self.router.layer = layer_number - 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        shares, experts = self.router(hidden_states)
        # Every rank's part of an expert adds to the gradients of its input and of the shares: summed in backward.
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(hidden_states)
            shares, experts = map(gather_from_sequence_parallel_region, (shares, experts))
        else:
            x, shares = map(copy_to_tensor_model_parallel_region, (hidden_states, shares))
        rows = self.experts(x.flatten(0, 1), shares.flatten(0, 1), experts.flatten(0, 1)).view(x.shape)
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(rows), None
        return reduce_from_tensor_model_parallel_region(rows), None


def routers_of(model: nn.Module) -> list[Router]:
    """Of this stage, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def _uninitialised(config: TransformerConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
