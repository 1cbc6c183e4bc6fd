"""What differs between kinds of training. Everything else (loop, checkpoints, resume, stop, console) is one code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.data.dataset import Mixture
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.model.architecture import Architecture
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.runtime.parallel import ParallelState


class Objective(Protocol):
    """What is minimised: binds each micro-batch to the model and says what the mean is taken over."""

    statistics: tuple[str, ...]
    """Columns of the sums that are kept: first what the mean is taken over, then the loss; `tokens` is one of them."""

    def begin_step(self, batches: list[Batch]) -> None:
        """Collective: prepare for the micro-batches of one step."""

    def bind(self, stage: MixGPTModel, index: int, batch: Batch, statistics: Tensor) -> None:
        """Last stage: give it the loss of micro-batch `index`. Its forward fills `statistics` [b, columns] fp64."""

    def count(self, batch: Batch) -> Tensor:
        """What the mean is taken over, in this micro-batch: int32 scalar."""

    def metrics(self, total: Sequence[float], by_source: dict[str, Sequence[float]]) -> dict[str, float]:
        """What metrics.jsonl gets from a step's sums, of all sources and of each."""

    def validation_metrics(self, total: Sequence[float]) -> dict[str, float]:
        """The same from the sums of one source's held-out samples; empty where there was nothing to measure."""

    def describe(self) -> str:
        """What is minimised, in a line."""


class Task(Protocol):
    """One kind of training on one mixture, for the loop."""

    objective: Objective
    validation: Objective
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


@dataclass(frozen=True)
class Recipe:
    """How a kind of training reads its data and is built once the starting weights are there."""

    read_mix: Callable[[Config], Mix]
    make_task: Callable[[Config, Mix, Architecture, MixGPTModel, ParallelState, Callable[[str], None]], Task]
    """Collective; the stage holds the starting weights and is not wrapped yet. The last argument is to be called with a
    few words whenever something long goes on."""
