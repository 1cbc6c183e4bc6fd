"""Training on packed text: Mix-CPT, plain continual pre-training, and supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.batch import IGNORE_INDEX, Batch, collate
from megatron_mixcpt.data.dataset import Mixture, train_dataset, valid_datasets
from megatron_mixcpt.data.mix import Mix, read_mix, reweighted
from megatron_mixcpt.losses.mixcpt import MixCPTLoss
from megatron_mixcpt.model.architecture import Architecture
from megatron_mixcpt.model.attention import document_mask
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.observe.throughput import flops_per_token
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.runtime.timing import section
from megatron_mixcpt.teacher import Teacher
from megatron_mixcpt.teacher.build import build_teacher
from megatron_mixcpt.train.agreement import COUNT
from megatron_mixcpt.train.task import Objective, Recipe, Task

BY_SOURCE = ("ce",)  # statistics that are shown for each source too
BY_KIND = ("kl_base",)  # and those for each kind of data, and then for each source


class MixCPTObjective:
    """Cross-entropy and, with a teacher, distillation: the mean over target tokens.

    Args:
        kinds: of the sources that training draws from; validation needs none.
    """

    def __init__(self, loss: MixCPTLoss, teacher: Teacher | None, kinds: dict[str, str] | None = None) -> None:
        self.loss, self.teacher, self.kinds = loss, teacher, kinds or {}
        self.statistics: tuple[str, ...] = loss.statistics

    def begin_step(self, batches: list[Batch]) -> None:
        if self.teacher is not None:
            with section("teacher"):
                self.teacher.begin_step(batches)

    def bind(self, stage: MixGPTModel, index: int, batch: Batch, statistics: Tensor) -> None:
        with section("teacher"):
            target = self.teacher.target(index, batch) if self.teacher is not None else None
        self.loss.attach(stage, batch.kinds, target, statistics)

    def weigh(self, kd_weight: float) -> None:
        self.loss.weigh(kd_weight)

    def count(self, batch: Batch) -> Tensor:
        return (batch.labels != IGNORE_INDEX).sum().int()

    def metrics(self, total: Sequence[float], by_source: dict[str, Sequence[float]]) -> dict[str, float]:
        means = {}
        for column, name in list(enumerate(self.statistics))[2:]:
            means[f"train/{name}"] = total[column] / max(total[COUNT], 1.0)
            if name in BY_SOURCE:
                means |= {f"train/{name}/{s}": row[column] / row[COUNT] for s, row in by_source.items() if row[COUNT]}
            if name in BY_KIND:
                means |= self._by_kind(name, column, by_source)
        return means

    def _by_kind(self, name: str, column: int, by_source: dict[str, Sequence[float]]) -> dict[str, float]:
        counts, sums, means = dict.fromkeys(self.kinds.values(), 0.0), dict.fromkeys(self.kinds.values(), 0.0), {}
        for source, row in by_source.items():
            counts[self.kinds[source]] += row[COUNT]
            sums[self.kinds[source]] += row[column]
            if row[COUNT]:
                means[f"train/{name}/source/{source}"] = row[column] / row[COUNT]
        return {f"train/{name}/{kind}": sums[kind] / count for kind, count in counts.items() if count} | means

    def validation_metrics(self, total: Sequence[float]) -> dict[str, float]:
        if total[COUNT] == 0:
            return {}
        loss = total[self.statistics.index("ce")] / total[COUNT]
        return {"loss": loss, "ppl": math.exp(min(loss, 700.0))}  # beyond, a float overflows

    def describe(self) -> str:
        loss = self.loss.config
        return f"{loss.ce_weight:g} CE" + (f" + {loss.kd_weight:g} KL({loss.target} teacher)" if self.teacher else "")


class MixCPTTask:
    """Training on the packed sequences of a mixture."""

    def __init__(self, config: Config, mix: Mix, arch: Architecture, loss: MixCPTLoss, teacher: Teacher | None):
        self._mix = mix
        kinds = {source.name: source.kind for source in mix.train_sources}
        self.objective: Objective = MixCPTObjective(loss, teacher, kinds)
        self.validation: Objective = MixCPTObjective(loss, None)
        self.row_length = mix.seq_length
        frozen = config.adapter is not None
        self.flops_per_token: float | None = flops_per_token(
            arch, mix.seq_length, with_teacher=config.runs_teacher, frozen=frozen
        )

    def train_dataset(self, seed: int, cache_dir: Path) -> Mixture:
        return train_dataset(self._mix, seed, cache_dir)

    def valid_datasets(self, seed: int, cache_dir: Path) -> dict[str, Dataset]:
        return dict(valid_datasets(self._mix, seed, cache_dir))

    @staticmethod  # loader processes get a copy of it: it must not bring the teacher along
    def collate(samples: list[dict]) -> Batch:
        return collate(samples)

    def fullest_batch(self, size: int) -> Batch:
        """Every token a target, and two documents a row, so that there is an attention mask."""
        tokens = torch.zeros(size, self.row_length, dtype=torch.int64)
        doc_start = torch.zeros(size, self.row_length, dtype=torch.bool)
        doc_start[:, [0, self.row_length // 2]] = True
        position_ids, attention_mask = document_mask(doc_start)
        kinds, source = torch.zeros_like(tokens), torch.zeros(size, dtype=torch.int64)
        return Batch(tokens, tokens.clone(), kinds, position_ids, attention_mask, source)


def read_text_mix(config: Config) -> Mix:
    """The packed sequences of `data.mix`, in the shares of `data.weights` where given. Raises ConfigError."""
    return reweighted(read_mix(config.data.mix, config.data.seq_length), config.data.weights)


def make_task(
    config: Config,
    mix: Mix,
    arch: Architecture,
    stage: MixGPTModel,
    state: ParallelState,
    beat: Callable[[str], None],
) -> Task:
    """Collective."""
    from megatron_mixcpt.train.setup import build_stage

    teacher = build_teacher(config, state, mix, stage, lambda: build_stage(config, arch, weights=False))
    loss = MixCPTLoss(
        config.loss,
        group=state.tensor_group if state.tensor_size > 1 else None,
        vocab_start=stage.vocab_start,
        vocab_size=arch.vocab_size,
        device=state.device,
    )
    return MixCPTTask(config, mix, arch, loss, teacher)


MIXCPT = Recipe(read_text_mix, make_task)
