"""Adapters in distributed checkpoints, readable in any layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_mixcpt.adapters.adapter import Adapter
from megatron_mixcpt.adapters.layout import AdaptedLinear
from megatron_mixcpt.architecture.layout import Place
from megatron_mixcpt.errors import VerificationError

PREFIX = "adapter."  # of all their keys


def adapter_sharded_state(adapters: Iterable[Adapter]) -> dict[str, ShardedTensor]:
    """`{key of the whole tensor: this rank's part, the parameter itself}`."""
    state = {}
    for adapter in adapters:
        for name, (_, axis) in adapter.layout.tensors().items():
            key, parameter = adapter.layout.key(name), adapter.get_parameter(name)
            if adapter.layout.experts:
                state[key] = _of_experts(key, parameter, axis, adapter.place)
            elif axis is None:
                state[key] = make_sharded_tensor_for_checkpoint(parameter, key)
            else:
                state[key] = make_tp_sharded_tensor_for_checkpoint(parameter, key, tp_axis=axis)
    return state


def _of_experts(key: str, parameter: Tensor, axis: int | None, place: Place) -> ShardedTensor:
    parts = [(0, place.expert, place.experts)]
    if axis is not None:
        parts.append((axis, place.tensor, place.tensors))
    replica = (0, place.tensor if axis is None else 0, parallel_state.get_expert_data_parallel_rank())
    return ShardedTensor.from_rank_offsets(key, parameter, *parts, replica_id=replica)


@torch.no_grad()
def load_adapter_state(adapters: Iterable[Adapter], loaded: Mapping[str, Tensor]) -> None:
    """Copy what dist_checkpointing filled into `adapter_sharded_state(adapters)`."""
    for adapter in adapters:
        for name in adapter.layout.tensors():
            adapter.get_parameter(name).copy_(loaded[adapter.layout.key(name)])


def load_adapters(adapters: list[Adapter], checkpoint: Path) -> None:
    """Fill adapters from a verified checkpoint that holds them. Collective."""
    loaded = dist_checkpointing.load({"model": adapter_sharded_state(adapters)}, str(checkpoint))
    load_adapter_state(adapters, loaded["model"])


def read_adapters(checkpoint: Path, linears: Iterable[AdaptedLinear]) -> dict[str, Tensor]:
    """Whole tensors by key, in one process and without a process group."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {}
    for linear in linears:
        for name, (shape, _) in linear.tensors().items():
            key = linear.key(name)
            entry = stored.get(key)
            if not isinstance(entry, TensorStorageMetadata):
                raise VerificationError(f"{checkpoint}: holds no {key}: it was written for other adapters")
            tensors[key] = torch.empty(shape, dtype=entry.properties.dtype)
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
