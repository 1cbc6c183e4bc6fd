"""Training on packed text: Mix-CPT, plain continual pre-training, and supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.batch import Batch, collate
from megatron_mixcpt.data.dataset import Mixture, train_dataset, valid_datasets
from megatron_mixcpt.data.mix import Mix, open_mix, reweighted
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.model.stage import Stage
from megatron_mixcpt.objectives.mixcpt import STATISTICS, MixCPTLoss
from megatron_mixcpt.objectives.task import COUNT
from megatron_mixcpt.plan.documents import document_lengths
from megatron_mixcpt.plan.work import work_of
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.teacher import Teacher
from megatron_mixcpt.teacher.build import build_teacher

BY_SOURCE = ("ce",)  # statistics that are shown for each source too
BY_KIND = ("kl_base",)  # and those for each kind of data, and then for each source


class PackedTextTask:
    """Training on the packed sequences of a mixture."""

    def __init__(
        self, config: Config, mix: Mix, arch: Architecture, objective: MixCPTLoss, validation: MixCPTLoss
    ) -> None:
        self._mix = mix
        self.objective, self.validation = objective, validation
        self._kinds = {source.name: source.kind for source in mix.train_sources}
        self.row_length = mix.seq_length
        work = work_of(config, arch, document_lengths(mix))
        self.flops_per_token: float | None = work.model if work.counts_teacher else None

    def train_dataset(self, seed: int, cache_dir: Path) -> Mixture:
        return train_dataset(self._mix, seed, cache_dir)

    def valid_datasets(self, seed: int, cache_dir: Path) -> dict[str, Dataset]:
        return dict(valid_datasets(self._mix, seed, cache_dir))

    @staticmethod  # loader processes get a copy of it: it must not bring the teacher along
    def collate(samples: list[dict]) -> Batch:
        return collate(samples)

    def fullest_batch(self, size: int) -> Batch:
        """Every token a target, and each row one document, for which attention takes the most.

        All kinds of tokens, which experts share among them as they do those of text.
        """
        tokens = (torch.arange(size * self.row_length) % self._mix.tokenizer.vocab_size).view(size, self.row_length)
        packing = Documents.whole(size, self.row_length)
        kinds, source = torch.zeros_like(tokens), torch.zeros(size, dtype=torch.int64)
        return Batch(tokens, tokens.clone(), kinds, packing.position_ids(), packing, source)

    def metrics(self, total: Sequence[float], by_source: Mapping[str, Sequence[float]]) -> dict[str, float]:
        means = {}
        for column, name in list(enumerate(self.objective.statistics))[2:]:
            means[f"train/{name}"] = total[column] / max(total[COUNT], 1.0)
            if name in BY_SOURCE:
                means |= {f"train/{name}/{s}": row[column] / row[COUNT] for s, row in by_source.items() if row[COUNT]}
            if name in BY_KIND:
                means |= self._by_kind(name, column, by_source)
        return means

    def _by_kind(self, name: str, column: int, by_source: Mapping[str, Sequence[float]]) -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        for source, row in by_source.items():
            for group in (self._kinds[source], f"source/{source}"):
                count, total = sums.get(group, (0.0, 0.0))
                sums[group] = [count + row[COUNT], total + row[column]]
        return {f"train/{name}/{group}": total / count for group, (count, total) in sums.items() if count}

    def validation_metrics(self, total: Sequence[float]) -> dict[str, float]:
        return validation_metrics(total)

    def describe(self) -> str:
        loss = self.objective.config
        distillation = f" + {loss.kd_weight:g} KL({loss.target} teacher)" if self.objective.teacher else ""
        return f"{loss.ce_weight:g} CE{distillation}"


def validation_metrics(total: Sequence[float]) -> dict[str, float]:
    """Loss and perplexity from sums of `MixCPTLoss`; empty where there was no target token."""
    if total[COUNT] == 0:
        return {}
    loss = total[STATISTICS.index("ce")] / total[COUNT]
    return {"loss": loss, "ppl": math.exp(min(loss, 700.0))}  # beyond, a float overflows


def read_text_mix(config: Config) -> Mix:
    """The packed sequences of `data.mix`, in the shares of `data.weights` where given. Raises ConfigError."""
    return reweighted(open_mix(config.data.mix, config.data.seq_length), config.data.weights)


def build_packed_text(
    config: Config,
    mix: Mix,
    arch: Architecture,
    stage: Stage,
    state: ParallelState,
    empty_stage: Callable[[], StageModel],
) -> PackedTextTask:
    """The task with its teacher. Collective; arguments as in build.build_task."""

    def loss(teacher: Teacher | None) -> MixCPTLoss:
        return MixCPTLoss(
            config.loss,
            teacher,
            group=state.tensor_group if state.tensor_size > 1 else None,
            vocab_start=stage.model.vocab_start,
            vocab_size=arch.vocab_size,
            device=state.device,
        )

    teacher = build_teacher(config, state, mix, stage, empty_stage)
    return PackedTextTask(config, mix, arch, loss(teacher), loss(None))
