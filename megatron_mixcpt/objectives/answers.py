"""Sums of log-probabilities of answers, without gradient, through Megatron's pipeline schedules.

Shapes: b micro-batch, s sequence, t tokens that count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from megatron_mixcpt.attention.context import context_sum
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.objectives.logprobs import TokenLogProbs, sums_by


@dataclass(kw_only=True)
class AnswerBatch(Batch):
    """A micro-batch that knows which of its labels belong to which document."""

    targets: torch.Tensor  # [t] int64, places of the answers' tokens in [s, b], flat
    documents: torch.Tensor  # [t] int64, document of each
    num_documents: int

    def part(self, rank: int, size: int) -> Batch:
        part = super().part(rank, size)
        assert isinstance(part, AnswerBatch) and part.places is not None
        b, s = self.tokens.shape
        local = torch.full((b, s), -1).scatter_(1, part.places, torch.arange(part.places.shape[1]).expand(b, -1))
        steps = local[self.targets % b, self.targets // b]
        here = steps >= 0
        targets, documents = (steps * b + self.targets % b)[here], self.documents[here]
        if len(targets) == 0:  # every rank takes part in the loss, here with a token of no document
            targets, documents = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1)
        return replace(part, targets=targets, documents=documents)


class AnswerSums:
    """An objective (task.Objective) that minimises nothing: it keeps each document's sum in `found`."""

    statistics: tuple[str, ...] = ("documents", "loss", "tokens")

    def __init__(self, log_probs: TokenLogProbs) -> None:
        self._log_probs = log_probs
        self.found: dict[int, Tensor] = {}
        """By micro-batch of the step, on the last pipeline stage: fp64 `[num_documents]`."""

    def begin_step(self, batches: list[Batch]) -> None:
        self.found = {}

    def bind(self, stage: MixGPTModel, index: int, batch: Batch, statistics: Tensor) -> None:
        answers = cast(AnswerBatch, batch)

        def keep(hidden: Tensor, labels: Tensor) -> Tensor:
            token = self._log_probs(hidden, stage.head_weight(), labels, answers.targets)
            self.found[index] = context_sum(sums_by(answers.documents, answers.num_documents, token))
            return token

        stage.loss = keep

    def count(self, batch: Batch) -> Tensor:
        return torch.ones((), dtype=torch.int32, device=batch.tokens.device)
