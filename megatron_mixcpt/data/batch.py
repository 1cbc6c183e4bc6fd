"""Micro-batches: which samples a rank reads at which step, and the tensors the model takes.

Shapes: b micro-batch size, s sequence length.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from multiprocessing import resource_tracker
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset

from megatron_mixcpt.attention.context import cut
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.data.dataset import Mixture, SampleKey
from megatron_mixcpt.data.position import Draw, Position
from megatron_mixcpt.data_prep.format import DOC_START, TARGET, kind_of
from megatron_mixcpt.runtime.stop import STOP_SIGNALS

IGNORE_INDEX = -100


@dataclass
class Batch:
    """One micro-batch of one data-parallel rank."""

    tokens: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64, IGNORE_INDEX where nothing is to be predicted
    kinds: torch.Tensor  # [b, s] int64, kind of data of each label (data_prep.format)
    position_ids: torch.Tensor  # [b, s] int64, counted within each packed document
    packing: Documents  # where the documents lie, to which attention is limited
    source: torch.Tensor  # [b] int64, index of the source each sample came from
    digest: int = 0  # sum of the samples' digests (see data.dataset.Mixture), modulo 2^64
    keys: tuple[SampleKey, ...] = ()  # of each training sample; made-up ones have none
    places: torch.Tensor | None = None  # [b, s] int64: of a part of longer rows, where its tokens are in them

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def here(self, device: torch.device) -> Batch:
        """What this rank computes of it, on its device: with context parallelism its part of every row."""
        size = parallel_state.get_context_parallel_world_size()
        batch = self.part(parallel_state.get_context_parallel_rank(), size) if size > 1 else self
        return batch.to(device)

    def part(self, rank: int, size: int) -> Batch:
        """The tokens of every row that `rank` of `size` has."""
        packing, places = cut(self.packing, rank, size)
        rows = {name: getattr(self, name).gather(1, places) for name in ("tokens", "labels", "kinds", "position_ids")}
        return replace(self, packing=packing, places=places, **rows)

    def pin_memory(self) -> Batch:
        """Called by the data loader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, packing=self.packing.map_tensors(function), **changed)


def of_part(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """x `[b, s, ...]` of whole rows -> what belongs to the tokens of `batch`, a part of them or all."""
    if batch.places is None:
        return x
    places = batch.places.to(x.device)
    return x[torch.arange(len(places), device=x.device).unsqueeze(1), places]


def collate(samples: list[dict]) -> Batch:
    """Stack dataset items (`tokens`, `flags`: `[s + 1]`) into a Batch on the CPU."""
    tokens = torch.stack([sample["tokens"] for sample in samples])
    flags = torch.stack([sample["flags"] for sample in samples])
    target = (flags[:, 1:] & TARGET).bool()
    doc_start = (flags[:, :-1] & DOC_START).bool()
    packing = Documents.of(doc_start)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=torch.where(target, tokens[:, 1:], IGNORE_INDEX),
        kinds=kind_of(flags[:, 1:]).long(),
        position_ids=packing.position_ids(),
        packing=packing,
        source=torch.tensor([sample.get("source", 0) for sample in samples]),
        digest=sum(sample.get("digest", 0) for sample in samples) % 2**64,
        keys=tuple(sample["key"] for sample in samples if "key" in sample),
    )


class RankSampler:
    """The draws of one data-parallel rank's micro-batches, from `position` on, without end.

    The ranks take the mixture's samples in turn, a micro-batch each. Which samples a step trains on thus depends
    neither on the data-parallel nor on the micro-batch size.
    """

    def __init__(self, position: Position, micro_batch_size: int, data_rank: int, data_size: int) -> None:
        self.position = position.copy()
        self.micro_batch_size, self.data_rank, self.data_size = micro_batch_size, data_rank, data_size

    def __iter__(self) -> Iterator[list[Draw]]:
        position, size = self.position.copy(), self.micro_batch_size
        while True:
            round_ = position.draw(size * self.data_size)
            yield round_[self.data_rank * size : (self.data_rank + 1) * size]


def train_batches(
    dataset: Mixture,
    position: Position,
    collate: Callable[[list[dict]], Batch] = collate,
    *,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """This rank's micro-batches from `position` on, which is left as it is: drawing is the trainer's to count.

    They are on the CPU, where they stay until they are used; `device` is where that will be.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=RankSampler(position, micro_batch_size, data_rank, data_size),  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        multiprocessing_context="spawn" if num_workers else None,
    )
    with _without_stop_signals():
        micro_batches = iter(loader)
    yield from micro_batches


@contextlib.contextmanager
def _without_stop_signals() -> Iterator[None]:
    """Processes started here keep stop signals blocked: schedulers send them to every process of a job, and stopping is
    the trainer's to do."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks some of them when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def valid_batches(
    dataset: Dataset, *, max_samples: int | None, micro_batch_size: int, data_rank: int, data_size: int
) -> list[list[int | None]]:
    """Sample indices of this rank's validation micro-batches: the same number on every rank, padded with None."""
    total = min(len(dataset), max_samples or len(dataset))  # type: ignore[arg-type]
    stride = micro_batch_size * data_size
    rounds = -(-total // stride)
    first = data_rank * micro_batch_size
    return [
        [index if index < total else None for index in range(r * stride + first, r * stride + first + micro_batch_size)]
        for r in range(rounds)
    ]
