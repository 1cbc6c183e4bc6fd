"""Writes one rank's share of a checkpoint: planned together, written alone, finished together.

megatron-core's own writer forks the training process, gloo and CUDA threads included, and waits on queues that a killed
child never fills. Here a share is written by a thread (or the main thread) into one file, hashed as it passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_mixcpt.checkpoint.manifest import Entry

Buffers = dict[tuple[str, Any], torch.Tensor]  # host memory by name and offset in the whole tensor


class ShareWriter(FileSystemWriterAsync):
    """This rank's items, and how they get into `<folder>/__<rank>_0.distcp`.

    Args:
        buffers: copy the values into these now, so that training may go on while they are written; filled by the first
            save and used again by the next, since fresh memory takes longer than the copy. None copies nothing.
    """

    def __init__(self, folder: Path, buffers: Buffers | None) -> None:
        super().__init__(folder, thread_count=1)
        self._buffers = buffers
        self._items: list[tuple[WriteItem, Any]] = []
        self.metadata: Metadata | None = None  # on rank 0
        self.num_bytes = 0
        self.num_written = 0  # grows while `write` runs

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Called at the end of planning, with the items that fall to this rank."""
        self._prefix = plan.storage_data.prefix
        for item in plan.items:
            value = planner.resolve_data(item)
            if item.type != WriteItemType.BYTE_IO:
                assert isinstance(value, torch.Tensor)
                self.num_bytes += value.numel() * value.element_size()
                value = value.detach()
                if self._buffers is not None:
                    key = (item.index.fqn, item.index.offset)
                    if key not in self._buffers:
                        self._buffers[key] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    value = self._buffers[key].copy_(value)
            self._items.append((item, value))

    def write(self) -> tuple[list[WriteResult], dict[str, Entry]]:
        """Write and flush the file; needs no other rank. Raises OSError and RuntimeError of a full or broken disk."""
        results: list[WriteResult] = []
        if not self._items:
            return results, {}
        name = f"{self._prefix}0.distcp"
        with open(Path(self.checkpoint_dir) / name, "wb") as file:
            stream: Any = _Hashing(file, self._count)
            for item, value in self._items:
                if item.type != WriteItemType.BYTE_IO:
                    value = value.cpu()
                    if value.untyped_storage().size() != value.numel() * value.element_size():
                        value = value.clone()  # a view would drag its whole storage along
                results.append(_write_item(self.transforms, stream, value, item, name, SerializationFormat.TORCH_SAVE))
            file.flush()
            os.fsync(file.fileno())
        self._items.clear()
        return results, {name: stream.entry()}

    def _count(self, num_bytes: int) -> None:
        self.num_written += num_bytes


class _Hashing:
    """A file for writing that hashes what passes, in the order in which it passes, and tells how much."""

    def __init__(self, file: Any, tell: Callable[[int], None]) -> None:
        self._file, self._state, self._size, self._tell = file, xxhash.xxh3_128(), 0, tell

    def write(self, data: Any) -> int:
        self._state.update(data)
        self._file.write(data)
        count = memoryview(data).nbytes
        self._size += count
        self._tell(count)
        return count

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> Entry:
        return {"size": self._size, "xxh3_128": self._state.hexdigest()}


def plan_share(share: dict[str, list[ShardedTensor]], folder: Path, buffers: Buffers | None) -> ShareWriter:
    """Collective: tell rank 0 what each rank writes. Touches no disk but for the folder's existence."""
    writer = ShareWriter(folder, buffers)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    (_, writer.metadata, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(share, False), writer, None, 0, planner=planner
    )
    return writer


def write_index(writer: ShareWriter, results: list[list[WriteResult]], common: dict[str, Any]) -> None:
    """Rank 0, after all shares: the files that say what is where, and `common`, which is not sharded."""
    assert writer.metadata is not None
    writer.finish(writer.metadata, results)
    torch.save(common, Path(writer.checkpoint_dir) / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(writer.checkpoint_dir))
