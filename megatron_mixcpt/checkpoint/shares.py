"""What this rank writes of a checkpoint, and what it needs of one.

Values that data-parallel ranks have in common (weights, and the state of an optimizer that is not distributed) are
written by all of them, some rows each; what the distributed optimizer cuts up is written where it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_mixcpt.checkpoint.boxes import Box, Piece, pieces_of
from megatron_mixcpt.checkpoint.info import FIRST_FORMAT, FORMAT
from megatron_mixcpt.checkpoint.optimizer_state import MASTER, optimizer_tensors


def optimizer_key(name: str, key: str, format: str = FORMAT) -> str:
    """How a checkpoint calls the optimizer's tensor `name` of the parameter `key`: as megatron-core does."""
    if format == FIRST_FORMAT:
        return f"optimizer.{'master' if name == MASTER else name}.{key}"
    return f"optimizer.state.{name}.{key}"


def replicas(*, of_experts: bool = False) -> torch.distributed.ProcessGroup:
    """The ranks that have the same part of the model; of the experts, which may be spread over ranks, others."""
    if of_experts:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _is_over_ranks(param: Tensor) -> bool:
    """Whether it is of experts that are spread over ranks (model.experts)."""
    return not getattr(param, "allreduce", True)


def written_here(state: dict[str, Any], optimizer: MegatronOptimizer | None) -> dict[str, list[ShardedTensor]]:
    """This rank's share of the weights in `state` (of `sharded_state_dict`) and of the optimizer's state, by key."""
    shares: dict[str, list[ShardedTensor]] = {}
    pieces = _pieces(state)

    def add(
        number: int, param: Tensor, piece: Piece, values: Tensor, begin: int, end: int, shared: bool, key: str
    ) -> None:
        if not piece.stored_here:
            return
        first, last = (begin, end)
        if shared:
            group = replicas(of_experts=_is_over_ranks(param))
            first, last = piece.share(number, group.rank(), group.size())
        for box in piece.boxes(first, last):
            part = values[box.begin - begin : box.end - begin].view(box.sizes)
            shares.setdefault(key, []).append(_sharded(replace(box, key=key), part))

    for number, (param, piece) in enumerate((param, piece) for param, of in pieces.values() for piece in of):
        add(number, param, piece, param.detach().view(-1), 0, param.numel(), True, piece.box.key)
    if optimizer is not None:
        for number, held in enumerate(optimizer_tensors(optimizer)):
            for piece in pieces[id(held.param)][1]:
                key = optimizer_key(held.name, piece.box.key)
                add(number, held.param, piece, held.values, held.begin, held.end, held.shared, key)
    return shares


def needed_here(
    state: dict[str, Any], optimizer: MegatronOptimizer | None, format: str = FORMAT, *, of_experts: bool = False
) -> Iterator[tuple[Box, Tensor]]:
    """What this rank loads: boxes, and the tensors (views of weights and optimizer state) that they go into.

    Args:
        format: of the checkpoint.
        of_experts: of experts that are spread over ranks, else of all the rest: their `replicas` are others.
    """
    pieces = _pieces(state)
    for param, of in pieces.values():
        if _is_over_ranks(param) != of_experts:
            continue
        for piece in of:
            box = piece.box
            yield box, param.detach().view(-1)[box.begin : box.end].view(box.sizes)
    if optimizer is not None:
        for held in optimizer_tensors(optimizer):
            if _is_over_ranks(held.param) != of_experts:
                continue
            for piece in pieces[id(held.param)][1]:
                key = optimizer_key(held.name, piece.box.key, format)
                for box in piece.boxes(held.begin, held.end):
                    target = held.values[box.begin - held.begin : box.end - held.begin]
                    yield replace(box, key=key), target.view(box.sizes)


def _pieces(state: dict[str, Any]) -> dict[int, tuple[Tensor, list[Piece]]]:
    """By id of the parameter."""
    sharded, _ = extract_sharded_tensors_and_factories(state)
    return {id(entry.data): (entry.data, pieces_of(entry)) for entry in nested_values(sharded)}


def _sharded(box: Box, values: Tensor) -> ShardedTensor:
    assert values.numel() == math.prod(box.sizes)
    return ShardedTensor(
        box.key,
        values,
        values.dtype,
        tuple(values.shape),
        box.shape,
        box.offsets,
        None,  # no regular grid
        allow_shape_mismatch=box.padded,
    )
