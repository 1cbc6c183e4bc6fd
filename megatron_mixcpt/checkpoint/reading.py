"""Reading into a layout: every stored byte that a group of replicas needs is read by one of them and passed on.

Who reads what follows from the checkpoint's index and from what each rank needs, so all decide alike: what one rank
alone needs it reads itself; the rest they share evenly, read at the same time, and tell each other.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_mixcpt.checkpoint.boxes import Box
from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.runtime.watchdog import alive

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class _Chunk:
    """A stored tensor, and what the ranks of the group need of it."""

    key: str
    offsets: torch.Size
    sizes: torch.Size
    dtype: torch.dtype
    uses: dict[int, list[tuple[int, Slices, Slices]]]
    """By rank: number of its box, the part of the box, and the part of this chunk that goes there."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


@torch.no_grad()
def read_boxes(checkpoint: Path, needed: Iterable[tuple[Box, Tensor]], group: ProcessGroup) -> int:
    """Fill tensors from a verified checkpoint. Collective over all ranks.

    Args:
        needed: boxes of whole tensors, each with the tensor of its sizes that is filled.
        group: the ranks that share the reading.

    Returns:
        bytes that this rank read.

    Raises VerificationError, on every rank, where the checkpoint does not hold what is needed or cannot be read.
    """
    boxes, targets = [], []
    for box, target in needed:
        if box.padded:
            target.zero_()
        boxes.append(box)
        targets.append(target)
    wanted: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(wanted, boxes, group=group)
    index: list[Any] = [FileSystemReader(str(checkpoint)).read_metadata() if group.rank() == 0 else None]
    torch.distributed.broadcast_object_list(index, group=group, group_src=0)
    chunks = list(_chunks(index[0], wanted))
    _raise_any(_missing(checkpoint, index[0], chunks, boxes, group.rank()))
    with ExitStack() as stack:
        files = _Files(checkpoint, index[0], stack)
        for chunk, values in _exchange(chunks, files, group):
            alive()
            for number, place, part in chunk.uses.get(group.rank(), ()):
                targets[number][place].copy_(values[part])
        _raise_any(files.problems)
        return files.num_bytes


def _exchange(chunks: list[_Chunk], files: _Files, group: ProcessGroup) -> Iterator[tuple[_Chunk, Tensor]]:
    """The values of every chunk that this rank needs."""
    rank, size = group.rank(), group.size()
    alone, shared = _assign(chunks, size)
    for mine in alone[rank]:
        yield mine, files.read(mine)
    for turn in range(max(map(len, shared))):
        now = [of[turn] if turn < len(of) else None for of in shared]
        next_of_mine = now[rank]
        own = files.read(next_of_mine) if next_of_mine is not None else None  # all at the same time
        for source, chunk in enumerate(now):
            if chunk is not None:
                yield chunk, _passed_on(chunk, own if source == rank else None, source, group)


def _passed_on(chunk: _Chunk, own: Tensor | None, source: int, group: ProcessGroup) -> Tensor:
    device = torch.cuda.current_device()
    values = torch.empty(chunk.sizes, dtype=chunk.dtype, device=device) if own is None else own.to(device)
    torch.distributed.broadcast(values.view(torch.uint8), group=group, group_src=source)
    return values


def _assign(chunks: list[_Chunk], ranks: int) -> tuple[list[list[_Chunk]], list[list[_Chunk]]]:
    """(what each rank reads for itself, what each reads for all), so that all read about as many bytes."""
    alone: list[list[_Chunk]] = [[] for _ in range(ranks)]
    shared: list[list[_Chunk]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for chunk in chunks:
        if len(chunk.uses) == 1:
            (rank,) = chunk.uses
            alone[rank].append(chunk)
            load[rank] += chunk.num_bytes
    for chunk in sorted((chunk for chunk in chunks if len(chunk.uses) > 1), key=lambda chunk: -chunk.num_bytes):
        rank = load.index(min(load))
        shared[rank].append(chunk)
        load[rank] += chunk.num_bytes
    return alone, shared


def _chunks(index: Metadata, wanted: Sequence[Sequence[Box]]) -> Iterator[_Chunk]:
    """The stored tensors that any of the ranks needs a part of, in the same order on every rank."""
    by_key: dict[str, list[tuple[int, int, Box]]] = {}
    for rank, boxes in enumerate(wanted):
        for number, box in enumerate(boxes):
            by_key.setdefault(box.key, []).append((rank, number, box))
    for key, places in by_key.items():
        entry = index.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            continue  # `_missing` tells
        stored = sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets))
        starts = [chunk.offsets[0] for chunk in stored]
        longest = max((chunk.sizes[0] for chunk in stored), default=0)
        uses: dict[int, dict[int, list[tuple[int, Slices, Slices]]]] = {}
        for rank, number, box in places:
            first = bisect.bisect_right(starts, box.offsets[0] - longest)
            last = bisect.bisect_left(starts, box.offsets[0] + box.sizes[0])
            for position in range(first, last):
                common = _common(box, stored[position])
                if common is not None:
                    uses.setdefault(position, {}).setdefault(rank, []).append((number, *common))
        for position in sorted(uses):
            chunk = stored[position]
            yield _Chunk(key, chunk.offsets, chunk.sizes, entry.properties.dtype, uses[position])


def _common(box: Box, chunk: ChunkStorageMetadata) -> tuple[Slices, Slices] | None:
    """What box and chunk have in common, as a part of each."""
    places, parts = [], []
    for offset, size, start, length in zip(box.offsets, box.sizes, chunk.offsets, chunk.sizes):
        begin, end = max(offset, start), min(offset + size, start + length)
        if begin >= end:
            return None
        places.append(slice(begin - offset, end - offset))
        parts.append(slice(begin - start, end - start))
    return tuple(places), tuple(parts)


def _missing(checkpoint: Path, index: Metadata, chunks: list[_Chunk], boxes: list[Box], rank: int) -> list[str]:
    """The first of this rank's boxes that the checkpoint does not hold whole."""
    found = [0] * len(boxes)
    for chunk in chunks:
        for number, place, _ in chunk.uses.get(rank, ()):
            found[number] += math.prod(part.stop - part.start for part in place)
    for box, count in zip(boxes, found):
        entry = index.state_dict_metadata.get(box.key)
        rows = box.sizes[0]
        if box.padded and isinstance(entry, TensorStorageMetadata):
            rows = max(0, min(rows, entry.size[0] - box.offsets[0]))
        if entry is None or count != rows * math.prod(box.sizes[1:]):
            return [f"{checkpoint}: holds no {box.key} of shape {box.shape}: it was written for another model"]
    return []


class _Files:
    """The files of a checkpoint, for reading. A failure is told later: other ranks wait for something to be sent."""

    def __init__(self, checkpoint: Path, index: Metadata, stack: ExitStack) -> None:
        self._checkpoint, self._places, self._stack = checkpoint, index.storage_data, stack
        self._open: dict[str, Any] = {}
        self.num_bytes = 0
        self.problems: list[str] = []

    def read(self, chunk: _Chunk) -> Tensor:
        try:
            place = self._places[MetadataIndex(chunk.key, chunk.offsets)]
            name = place.relative_path
            if name not in self._open:
                self._open[name] = self._stack.enter_context((self._checkpoint / name).open("rb"))
            view: Any = _create_file_view(self._open[name], place.offset, place.length)
            values = torch.load(view, map_location="cpu", weights_only=True)
            self.num_bytes += place.length
            if values.shape != chunk.sizes or values.dtype != chunk.dtype:
                raise ValueError(f"{values.dtype} {tuple(values.shape)} where the index says {tuple(chunk.sizes)}")
            return values
        except Exception as error:  # a damaged file ends in many kinds of them
            self.problems.append(f"{self._checkpoint}: {chunk.key} cannot be read: {error}")
            return torch.zeros(chunk.sizes, dtype=chunk.dtype)


def _raise_any(problems: list[str]) -> None:
    """Collective: raise VerificationError on every rank where one has a problem."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, problems)
    for problem in (line for lines in found for line in lines):
        raise VerificationError(problem)
