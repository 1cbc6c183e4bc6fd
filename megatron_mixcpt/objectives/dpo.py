"""Direct preference optimization, as a task of the training loop.

The mean is over the global number of pairs of a step, however they are packed, cut into micro-batches and spread.

Shapes: n pairs of a micro-batch, b its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.attention.context import context_sum, speaks_for_context
from megatron_mixcpt.config import AlignSettings, Config
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.data.dataset import Mixture
from megatron_mixcpt.data.mix import Mix, Split
from megatron_mixcpt.data_prep.format import DOC_START, TARGET
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.model.stage import Stage
from megatron_mixcpt.objectives.logprobs import TokenLogProbs, sums_by
from megatron_mixcpt.objectives.pairs import PairBatch, PairRows, collate_pairs
from megatron_mixcpt.objectives.preference import preference_loss
from megatron_mixcpt.objectives.reference import reference_log_probs
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.runtime.timing import section

STATISTICS = (
    "pairs",
    "loss",
    "tokens",
    "reward_chosen",
    "reward_rejected",
    "correct",
    "log_prob_chosen",
    "log_prob_rejected",
    "tokens_chosen",
    "log_ratio",
)


class DPOObjective:
    """The preference loss of preference.py, from the answers' log-probabilities under the model in training."""

    statistics: tuple[str, ...] = STATISTICS

    def __init__(self, settings: AlignSettings, log_probs: TokenLogProbs) -> None:
        self.settings, self._log_probs = settings, log_probs

    def begin_step(self, batches: list[Batch]) -> None:
        pass

    def bind(self, stage: MixGPTModel, index: int, batch: Batch, statistics: Tensor) -> None:
        pairs = cast(PairBatch, batch)
        n = len(pairs.rows)

        def pair_loss(hidden: Tensor, labels: Tensor) -> Tensor:
            with section("loss"):
                token = self._log_probs(hidden, stage.head_weight(), labels, pairs.targets)  # [t]
                policy = context_sum(sums_by(pairs.documents, 2 * n, token)).view(n, 2)
                num_tokens = context_sum(sums_by(pairs.documents, 2 * n, torch.ones_like(token))).view(n, 2)
                loss, rewards = preference_loss(policy, pairs.reference, num_tokens, self.settings)
                answers = policy.detach()
                columns = (
                    torch.ones_like(loss),
                    loss.detach(),
                    num_tokens.sum(1),
                    rewards[:, 0],
                    rewards[:, 1],
                    0.5 * (1.0 + (rewards[:, 0] - rewards[:, 1]).sign()),  # a tie counts half
                    answers[:, 0],
                    answers[:, 1],
                    num_tokens[:, 0],
                    (answers - pairs.reference).sum(1),
                )
                table = torch.stack([column.double() for column in columns], dim=1)  # [n, columns]
                if speaks_for_context():  # all of its ranks know the whole pairs
                    statistics.copy_(sums_by(pairs.rows, len(statistics), table))
                return loss

        stage.loss = pair_loss

    def count(self, batch: Batch) -> Tensor:
        pairs = len(cast(PairBatch, batch).rows) if speaks_for_context() else 0
        return torch.full((), pairs, dtype=torch.int32, device=batch.tokens.device)  # no copy, which would wait


class DPOTask:
    """Training on the packed preference pairs of a mixture."""

    def __init__(self, mix: Mix, objective: DPOObjective, row_length: int) -> None:
        self._mix = mix
        self.objective = self.validation = objective
        self.row_length = row_length
        self.flops_per_token: float | None = None  # only answers meet the head: it depends on each row
        self.splits = {source.name: (source.train, source.valid) for source in mix.sources}
        self.datasets = {
            split.prefix: PairRows(split.prefix, self.row_length)
            for splits in self.splits.values()
            for split in splits
            if split
        }

    def train_dataset(self, seed: int, cache_dir: Path) -> Mixture:
        sources = self._mix.train_sources
        return Mixture([source.name for source in sources], [self._rows(source.train) for source in sources], seed)

    def valid_datasets(self, seed: int, cache_dir: Path) -> dict[str, Dataset]:
        return {source.name: self._rows(source.valid) for source in self._mix.sources if source.valid}

    def _rows(self, split: Split | None) -> PairRows:
        assert split is not None
        return self.datasets[split.prefix]

    @staticmethod  # loader processes get a copy of it: it must not bring the model along
    def collate(samples: list[dict]) -> Batch:
        return collate_pairs(samples)

    def fullest_batch(self, size: int) -> Batch:
        """One pair a row, all its tokens answers."""
        tokens = torch.arange(self.row_length + 1) % self._mix.tokenizer.vocab_size
        flags = torch.full_like(tokens, TARGET, dtype=torch.uint8)
        flags[[0, self.row_length // 2]] = DOC_START
        sample = {"tokens": tokens, "flags": flags, "reference": torch.zeros(1, 2, dtype=torch.float64)}
        return collate_pairs([sample] * size)

    def metrics(self, total: Sequence[float], by_source: Mapping[str, Sequence[float]]) -> dict[str, float]:
        sums = dict(zip(STATISTICS, total))
        pairs, tokens = max(sums["pairs"], 1.0), max(sums["tokens"], 1.0)
        chosen = max(sums["tokens_chosen"], 1.0)
        metrics = {
            "data/pairs": sums["pairs"],
            "rewards/chosen": sums["reward_chosen"] / pairs,
            "rewards/rejected": sums["reward_rejected"] / pairs,
            "rewards/margin": (sums["reward_chosen"] - sums["reward_rejected"]) / pairs,
            "rewards/accuracy": sums["correct"] / pairs,
            "rewards/kl": sums["log_ratio"] / tokens,
            "logps/chosen": sums["log_prob_chosen"] / chosen,
            "logps/rejected": sums["log_prob_rejected"] / max(sums["tokens"] - sums["tokens_chosen"], 1.0),
        }
        correct = STATISTICS.index("correct")
        return metrics | {f"rewards/accuracy/{name}": r[correct] / r[0] for name, r in by_source.items() if r[0] > 0}

    def validation_metrics(self, total: Sequence[float]) -> dict[str, float]:
        sums = dict(zip(STATISTICS, total))
        pairs = sums["pairs"]
        if pairs == 0:
            return {}
        margin = (sums["reward_chosen"] - sums["reward_rejected"]) / pairs
        return {"loss": sums["loss"] / pairs, "accuracy": sums["correct"] / pairs, "margin": margin}

    def describe(self) -> str:
        settings = self.objective.settings
        extras = [f"label smoothing {settings.label_smoothing:g}"] * bool(settings.label_smoothing)
        extras += ["length-normalised"] * settings.length_normalized
        return ", ".join([f"DPO, {settings.loss}, beta {settings.beta:g}", *extras])


def build_dpo(
    config: Config,
    mix: Mix,
    arch: Architecture,
    stage: Stage,
    state: ParallelState,
    heartbeat: Callable[[str], None],
) -> DPOTask:
    """The task, with the reference log-probabilities computed or read. Collective; arguments as in build.build_task."""
    assert config.align is not None
    log_probs = TokenLogProbs(state, stage.model.vocab_start, arch.vocab_size)
    task = DPOTask(mix, DPOObjective(config.align, log_probs), config.row_sequences * mix.seq_length)
    for name, splits in task.splits.items():
        for part, split in zip(("train", "valid"), splits):
            if split:
                rows = task.datasets[split.prefix]
                rows.reference = reference_log_probs(
                    config, f"{name}-{part}", split, rows, stage, state, log_probs, heartbeat
                )
    return task
