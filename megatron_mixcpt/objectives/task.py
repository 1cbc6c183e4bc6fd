"""What differs between kinds of training. Everything else (loop, checkpoints, resume, stop, console) is one code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset

from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.data.dataset import Mixture
from megatron_mixcpt.model.gpt import MixGPTModel

COUNT, LOSS = 0, 1  # of the columns that every objective keeps


class Objective(Protocol):
    """What is minimised: gives the model the loss of each micro-batch and says what the mean is taken over."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Columns of the sums that are kept: first what the mean is taken over, then the loss; `tokens` is one of
        them."""

    def begin_step(self, batches: list[Batch]) -> None:
        """Collective: prepare for the micro-batches of one step."""

    def bind(self, stage: MixGPTModel, index: int, batch: Batch, statistics: Tensor) -> None:
        """Last stage: set `stage.loss` for micro-batch `index`. It fills `statistics` [b, columns] fp64."""

    def count(self, batch: Batch) -> Tensor:
        """What the mean is taken over, in this micro-batch: int32 scalar."""


class Task(Protocol):
    """One kind of training on one mixture, for the loop: what is minimised, on what, and what is told of it."""

    @property
    def objective(self) -> Objective:
        """In training."""

    @property
    def validation(self) -> Objective:
        """On held-out data."""

    row_length: int
    """Tokens of a sample."""
    flops_per_token: float | None
    """Model FLOPs to train on one token; None where it is no constant, and then there is no MFU."""

    def train_dataset(self, seed: int, cache_dir: Path) -> Mixture:
        """Collective: all training samples."""

    def valid_datasets(self, seed: int, cache_dir: Path) -> dict[str, Dataset]:
        """Collective: held-out samples by source; index None gives a sample without anything to learn."""

    @staticmethod
    def collate(samples: list[dict]) -> Batch:
        """Samples into a micro-batch on the CPU."""

    def fullest_batch(self, size: int) -> Batch:
        """The largest micro-batch there can be, of made-up data, on the CPU."""

    def metrics(self, total: Sequence[float], by_source: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """What metrics.jsonl gets from a step's sums (columns: `objective.statistics`), of all sources and of each."""

    def validation_metrics(self, total: Sequence[float]) -> dict[str, float]:
        """The same from the sums of one source's held-out samples; empty where there was nothing to measure."""

    def describe(self) -> str:
        """What is minimised, in a line."""
