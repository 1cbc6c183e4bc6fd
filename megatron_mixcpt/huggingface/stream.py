"""Whole tensors out of a distributed checkpoint, one at a time, without building the model.

megatron-core's checkpoints are PyTorch's (torch.distributed.checkpoint) with all layers of a kind stacked into one
tensor `[layers, ...]`.
"""

import contextlib
import io
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import whole_shapes
from megatron_mixcpt.errors import VerificationError

AHEAD_NUMBERS = 2**23  # what `read_ahead` reads ahead at most where that is more than the next tensor
# specs.layer_spec gives these parameters the names that they have in megatron-core's own checkpoints.
_RENAMED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "mlp.experts.": "mlp.experts.experts.",
}


def stored_as(name: str, arch: Architecture) -> tuple[str, int | None]:
    """(key in the checkpoint, index in the stack of layers); layers of different kinds are not stacked."""
    if not name.startswith("decoder.layers."):
        return name, None
    _, _, layer, rest = name.split(".", 3)
    for ours, theirs in _RENAMED.items():
        rest = rest.replace(ours, theirs)
    if arch.layers_differ:
        return f"decoder.layers.{layer}.{rest}", None
    return f"decoder.layers.{rest}", int(layer)


class CheckpointSource:
    """Whole tensors (see layout.py) of a checkpoint directory, whatever layout wrote it."""

    def __init__(self, checkpoint: Path, arch: Architecture) -> None:
        self._path, self._arch, self._shapes = checkpoint, arch, whole_shapes(arch)
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
        key, layer = stored_as(name, self._arch)
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
    """Reads every item into its place in one tensor.

    `FileSystemReader.read_data` asks for the places of tensors and no more: there are no objects among weights, and the
    plan comes from `CheckpointSource.read`. What else the interface has says so.
    """

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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Moving bytes is bound by memory: OpenMP's other threads would only spin while they wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_ahead(shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, `read(name)`) in order, read in a thread that is ahead by one tensor, or by several small ones."""
    names = deque(shapes)
    coming: deque[tuple[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def submit() -> None:
            ahead = sum(math.prod(shapes[name]) for name, _ in coming)
            while names and (not coming or ahead + math.prod(shapes[names[0]]) <= AHEAD_NUMBERS):
                coming.append((names[0], thread.submit(read, names[0])))
                ahead += math.prod(shapes[names.popleft()])

        submit()
        while coming:
            name, tensor = coming.popleft()
            submit()
            yield name, tensor.result()
