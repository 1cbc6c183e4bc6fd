"""Whole tensors in and out of a distributed checkpoint, one at a time, without building the model.

megatron-core's checkpoints are PyTorch's (torch.distributed.checkpoint) with all layers of a kind stacked into one
tensor `[layers, ...]`; what is written here loads into any TP x PP layout like one that training saved.
"""

import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.model.architecture import Architecture
from megatron_mixcpt.model.layout import whole_shapes

# specs.layer_spec gives these parameters the names that they have in megatron-core's own checkpoints.
_RENAMED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
# What megatron-core's `dist_checkpointing` looks at first (its CheckpointingConfig).
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _stored(name: str) -> tuple[str, int | None]:
    """(key in the checkpoint, index in the stack of layers)."""
    if not name.startswith("decoder.layers."):
        return name, None
    _, _, layer, rest = name.split(".", 3)
    for ours, theirs in _RENAMED.items():
        rest = rest.replace(ours, theirs)
    return f"decoder.layers.{rest}", int(layer)


class CheckpointSource:
    """Whole tensors (see layout.py) of a checkpoint directory, whatever layout wrote it."""

    def __init__(self, checkpoint: Path, arch: Architecture) -> None:
        self._path, self._shapes = checkpoint, whole_shapes(arch)
        self._reader = FileSystemReader(checkpoint)
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, EOFError) as error:
            raise VerificationError(f"{checkpoint}: its .metadata cannot be read: {error}") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored weights."""
        return self._entry(next(iter(self._shapes)))[1].properties.dtype

    def _entry(self, name: str) -> tuple[str, TensorStorageMetadata, int | None]:
        key, layer = _stored(name)
        # The trainer stores optimizer state beside the weights, each under a prefix of its own or none.
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise VerificationError(f"{self._path}: holds no {key}: it was written for another architecture")
        return key, entry, layer

    def read(self, name: str) -> Tensor:
        """A whole tensor in its stored type, without vocabulary padding."""
        key, entry, layer = self._entry(name)
        shape = self._shapes[name]
        stacked = shape if layer is None else (1, *shape)
        chunk = ChunkStorageMetadata(
            offsets=torch.Size([layer or 0] + [0] * (len(stacked) - 1)), sizes=torch.Size(stacked)
        )
        target = torch.empty(stacked, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        read = sum(math.prod(item.lengths) for item in items)
        if read != target.numel():
            raise VerificationError(f"{self._path}: {key} is {tuple(entry.size)}, which does not hold {stacked}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except Exception as error:  # a damaged file ends in many kinds of them
            raise VerificationError(f"{self._path}: {key} cannot be read ({error}): it is damaged") from error
        return target.view(shape)


class _Into(LoadPlanner):
    """Reads every item into its place in one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths)
        return self._target[tuple(slice(start, start + length) for start, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was read into place."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("weights are tensors")

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the plan is made by the caller."""

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the plan is made by the caller")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


class _Lazy(SavePlanner):
    """Hands out each whole tensor when the writer comes to it."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, produce: Callable[[str], Tensor]) -> None:
        self._produce, self._dtype = produce, dtype
        self._names: dict[MetadataIndex, str] = {}
        items = []
        for name, shape in whole_shapes(arch).items():
            key, layer = _stored(name)
            item = _write_item(key, layer, shape, arch.num_layers, dtype)
            self._names[item.index] = name
            items.append(item)
        self.plan, self.metadata = self.create_global_plan([SavePlan(items)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = MetadataIndex(write_item.index.fqn, write_item.index.offset)
        tensor = self._produce(self._names[index]).to(self._dtype)
        layer = _stored(self._names[index])[1]
        return tensor if layer is None else tensor.unsqueeze(0)

    def set_up_planner(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Nothing: the plan follows from the architecture."""

    def create_local_plan(self) -> SavePlan:
        return self.plan[0]

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan


def _write_item(key: str, layer: int | None, shape: tuple[int, ...], layers: int, dtype: torch.dtype) -> WriteItem:
    size = shape if layer is None else (layers, *shape)
    offsets = torch.Size([layer or 0] + [0] * (len(size) - 1))
    chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(shape if layer is None else (1, *shape)))
    return WriteItem(
        index=MetadataIndex(key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=dtype), size=torch.Size(size)),
    )


def write_weights(folder: Path, arch: Architecture, dtype: torch.dtype, produce: Callable[[str], Tensor]) -> None:
    """Write a distributed checkpoint of weights into an existing directory.

    `produce(name)` returns a whole tensor (see layout.py); it is called once for each, and none is kept.
    """
    planner = _Lazy(arch, dtype, produce)
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_global_plan([writer.prepare_local_plan(planner.plan[0])])[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        results = writer.write_data(plan, planner)
    results.wait()
    writer.finish(planner.metadata, [results.value()])
    torch.save({}, folder / "common.pt")  # megatron-core's place for what is not a tensor
    (folder / "metadata.json").write_text(json.dumps(_BACKEND))
