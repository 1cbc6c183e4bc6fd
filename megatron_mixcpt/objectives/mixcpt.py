"""Mix-CPT's stage-1 objective: next-token prediction plus logit-swap self-distillation (arXiv 2407.10804).

Loss a token = ce * CE(student, label) + kd * KL(swapped teacher || student), with ce and kd by kind of data. The mean
is taken once, by the trainer, over the global number of target tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_mixcpt.config import LossConfig
from megatron_mixcpt.data.batch import IGNORE_INDEX, Batch
from megatron_mixcpt.data_prep.format import KIND_CHOSEN, KIND_DOMAIN, KIND_GENERAL, KIND_INSTRUCTION, KIND_REJECTED
from megatron_mixcpt.kernels import linear_lssd_loss, lssd_loss, topk_lssd_loss
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.runtime.timing import section
from megatron_mixcpt.teacher.interface import DenseTarget, HiddenTarget, Target, Teacher, TopkTarget

KIND_NAMES = {
    KIND_DOMAIN: "domain",
    KIND_INSTRUCTION: "instruction",
    KIND_CHOSEN: "preference",
    KIND_REJECTED: "preference",
    KIND_GENERAL: "general",
}

# Columns of the per-sample statistics: sums over target tokens. The mean of each from the third on is shown as the
# metric `train/<name>`.
STATISTICS = ("tokens", "loss", "ce", "kd", "swap_rate", "kl_base")
WITHOUT_TEACHER = STATISTICS[:3]


class MixCPTLoss:
    """An objective (task.Objective): the mean of the loss over target tokens, on one model shard.

    Args:
        config: weights, target and temperature.
        teacher: None for cross-entropy alone; the weights of `config` stay what they are.
        group: tensor-parallel process group the vocabulary is sharded over; None where it is whole.
        vocab_start: global id of this rank's first logit.
        vocab_size: entries without padding; the logits beyond take no part.
        device: where the batches are.
    """

    def __init__(
        self,
        config: LossConfig,
        teacher: Teacher | None,
        *,
        group: torch.distributed.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.teacher = config, teacher
        self.group, self.vocab_start, self.vocab_size = group, vocab_start, vocab_size
        kd_weight = config.start_kd_weight
        self.statistics: tuple[str, ...] = STATISTICS if kd_weight > 0.0 else WITHOUT_TEACHER
        self._ce_by_kind, self._kd_by_kind = torch.zeros(2, len(KIND_NAMES), device=device)
        self.weigh(kd_weight)

    def weigh(self, kd_weight: float) -> None:
        """Set the weight of the distillation for the steps to come."""
        config = self.config
        scale = 1.0 / (config.ce_weight + kd_weight) if config.normalize else 1.0
        ce_by_kind, kd_by_kind = [], []
        for kind in sorted(KIND_NAMES):
            factors = config.factors(KIND_NAMES[kind])
            ce_by_kind.append(scale * config.ce_weight * factors.ce)
            kd_by_kind.append(scale * kd_weight * factors.kd)
        self._ce_by_kind.copy_(torch.tensor(ce_by_kind))
        self._kd_by_kind.copy_(torch.tensor(kd_by_kind))

    def begin_step(self, batches: list[Batch]) -> None:
        if self.teacher is not None:
            with section("teacher"):
                self.teacher.begin_step(batches)

    def bind(self, stage: MixGPTModel, index: int, batch: Batch, statistics: Tensor) -> None:
        target = None
        if self.teacher is not None:
            with section("teacher"):
                target = self.teacher.target(index, batch)
        stage.loss = partial(self._of_stage, stage, batch.kinds, target, statistics)

    def count(self, batch: Batch) -> Tensor:
        return (batch.labels != IGNORE_INDEX).sum().int()

    def _of_stage(
        self,
        stage: MixGPTModel,
        kinds: Tensor,
        target: Target | None,
        statistics: Tensor,
        hidden: Tensor,
        labels: Tensor,
    ) -> Tensor:
        if isinstance(target, HiddenTarget) or (target is None and self.config.fuse_lm_head):  # None: in validations
            with section("loss"):
                return self.of_hidden(hidden, stage.head_weight(), target, labels, kinds, statistics)
        logits = stage.output_logits(hidden)
        with section("loss"):
            return self.of_logits(logits, target, labels, kinds, statistics)

    def of_logits(
        self,
        logits: Tensor,
        target: DenseTarget | TopkTarget | None,
        labels: Tensor,
        kinds: Tensor,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """The loss of every token, fp32 `[b, s]`, 0 where labels are ignored.

        Args:
            logits: `[s, b, v/tp]`.
            target: of the teacher; None for cross-entropy alone. Training writes the gradient over a DenseTarget: it
                must not be read again.
            labels: `[b, s]` int64.
            kinds: `[b, s]` int64, kind of each label.
            statistics: `[b, len(self.statistics)]` fp64, filled with each sample's sums; None keeps none.
        """
        if isinstance(target, TopkTarget):
            teacher = (target.ids, target.logp, target.gold_logp)
            loss, details = topk_lssd_loss(logits, *teacher, labels.t(), **self._options(kinds))
        else:
            loss, details = lssd_loss(
                logits,
                target.logits if target else None,
                labels.t(),
                grad_buffer="teacher" if target and logits.requires_grad else "new",
                **self._options(kinds),
            )
        _record(statistics, labels, loss, details)
        return loss.t()

    def of_hidden(
        self,
        hidden: Tensor,
        head: Tensor,
        target: HiddenTarget | None,
        labels: Tensor,
        kinds: Tensor,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """As `of_logits`, from hidden states `[s(/tp), b, h]` and output heads `[v/tp, h]`: the logits exist a chunk of
        tokens at a time."""
        loss, details = linear_lssd_loss(
            hidden,
            head,
            target.hidden if target else None,
            target.head if target else None,
            labels.t(),
            sequence_parallel=hidden.shape[0] != labels.shape[1],
            **self._options(kinds),
        )
        _record(statistics, labels, loss, details)
        return loss.t()

    def _options(self, kinds: Tensor) -> dict[str, Any]:
        """What the kernels' losses have in common, for the tokens of one micro-batch."""
        return {
            "temperature": self.config.temperature,
            "ce_weight": self._ce_by_kind[kinds].t(),
            "kd_weight": self._kd_by_kind[kinds].t(),
            "target": "swap" if self.config.target == "none" else self.config.target,
            "margin": self.config.margin,
            "group": self.group,
            "vocab_start": self.vocab_start,
            "valid_vocab": self.vocab_size,
            "return_details": True,
        }


def _record(statistics: Tensor | None, labels: Tensor, loss: Tensor, details: dict[str, Tensor]) -> None:
    """Fill each sample's sums of the first columns named in STATISTICS. labels `[b, s]`; loss and details `[s, b]`."""
    if statistics is not None:
        columns = ((labels != -100).t(), loss.detach(), *(details[name] for name in ("ce", "kl", "swapped", "kl_base")))
        statistics.copy_(torch.stack([column.double().sum(0) for column in columns[: statistics.shape[1]]], dim=1))
