"""Whole tensors into a distributed checkpoint, one at a time; it loads like one that training saved."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import whole_shapes
from megatron_mixcpt.huggingface.stream import stored_as
from megatron_mixcpt.huggingface.tensorfiles import blocks

# What megatron-core's `dist_checkpointing` looks at first (its CheckpointingConfig).
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _Lazy(SavePlanner):
    """Hands out each whole tensor when the writer comes to it."""

    def __init__(
        self, arch: Architecture, dtype: torch.dtype, tensors: Iterator[tuple[str, Tensor]], done: Callable[[str], None]
    ) -> None:
        self._arch, self._tensors, self._dtype, self._done = arch, tensors, dtype, done
        items = []
        for name, shape in whole_shapes(arch).items():
            key, layer = stored_as(name, arch)
            items.append(_write_item(key, layer, shape, arch.num_layers, dtype))
        self.plan, self.metadata = self.create_global_plan([SavePlan(items)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name, tensor = next(self._tensors)
        key, _ = stored_as(name, self._arch)
        assert key == write_item.index.fqn and write_item.tensor_data is not None
        self._done(key)
        return tensor.to(self._dtype).view(write_item.tensor_data.chunk.sizes)

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


class _HashingFile:
    """A file for writing that hashes what passes, in order."""

    def __init__(self, file: Any) -> None:
        self._file, self._state, self._size = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        before = self._size
        for block in blocks(data):
            self._state.update(block)
            self._size += self._file.write(block)
        return self._size - before

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def entry(self) -> dict[str, Any]:
        return {"size": self._size, "xxh3_128": self._state.hexdigest()}


class _HashingFileSystem(FileSystem):
    """Opens files for writing as hashing ones, and keeps what they hashed."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            if "w" not in mode:
                yield file
                return
            hashing = _HashingFile(file)
            yield hashing
            self.entries[Path(path).name] = hashing.entry()


def write_weights(
    folder: Path,
    arch: Architecture,
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
    done: Callable[[str], None] = lambda key: None,
) -> dict[str, dict[str, Any]]:
    """Write a distributed checkpoint of weights into an existing directory.

    Args:
        tensors: (name, whole tensor) in the order of `layout.whole_shapes`, taken one at a time and not kept.
        done: called with the key of each written tensor.

    Returns:
        size and xxh3-128 of the file of weights, hashed as it was written, by its name (see checkpoint/manifest.py).
    """
    planner = _Lazy(arch, dtype, tensors, done)
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    writer.fs = files = _HashingFileSystem()
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_global_plan([writer.prepare_local_plan(planner.plan[0])])[0]
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # nothing ever checks them, and the file has a better hash
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
            results = writer.write_data(plan, planner)
        results.wait()
    finally:
        torch.serialization.set_crc32_options(checksums)
    written = {name: entry for name, entry in files.entries.items() if name.endswith(".distcp")}
    writer.finish(planner.metadata, [results.value()])
    torch.save({}, folder / "common.pt")  # megatron-core's place for what is not a tensor
    (folder / "metadata.json").write_text(json.dumps(_BACKEND))
    return written
