"""Mix-CPT's stage-1 objective: next-token prediction plus logit-swap self-distillation (arXiv 2407.10804).

Loss a token = ce * CE(student, label) + kd * KL(swapped teacher || student), with ce and kd by kind of data. The mean
is taken once, by the trainer, over the global number of target tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from megatron_mixcpt.config import LossConfig
from megatron_mixcpt.data_prep.format import KIND_CHOSEN, KIND_DOMAIN, KIND_GENERAL, KIND_INSTRUCTION, KIND_REJECTED
from megatron_mixcpt.kernels import linear_lssd_loss, lssd_loss, topk_lssd_loss
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.teacher.interface import HiddenTarget, Target, TopkTarget

KIND_NAMES = {
    KIND_DOMAIN: "domain",
    KIND_INSTRUCTION: "instruction",
    KIND_CHOSEN: "preference",
    KIND_REJECTED: "preference",
    KIND_GENERAL: "general",
}

# Columns of the per-sample statistics below. Every objective has `statistics`, sums over target tokens that begin with
# "tokens" and "loss"; the mean of each of the others is shown as the metric `train/<name>`.
STATISTICS = ("tokens", "loss", "ce", "kd", "swap_rate", "kl_base")
WITHOUT_TEACHER = STATISTICS[:3]


class MixCPTLoss:
    """Per-token loss of one model shard, and the statistics behind it.

    Args:
        config: weights, target and temperature.
        group: tensor-parallel process group the vocabulary is sharded over; None where it is whole.
        vocab_start: global id of this rank's first logit.
        vocab_size: entries without padding; the logits beyond take no part.
        device: where the batches are.

    Attributes:
        statistics: names of what is counted.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        group: torch.distributed.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.group, self.vocab_start, self.vocab_size = group, vocab_start, vocab_size
        kd_weight = 0.0 if config.target == "none" else config.kd_weight
        self.statistics = STATISTICS if kd_weight > 0.0 else WITHOUT_TEACHER
        self._ce_by_kind, self._kd_by_kind = torch.zeros(2, len(KIND_NAMES), device=device)
        self.weigh(kd_weight)

    def weigh(self, kd_weight: float) -> None:
        """Set the weight of the distillation, for the steps to come."""
        config = self.config
        scale = 1.0 / (config.ce_weight + kd_weight) if config.normalize else 1.0
        ce_by_kind, kd_by_kind = [], []
        for kind in sorted(KIND_NAMES):
            factors = config.by_kind.get(cast(Literal["domain"], KIND_NAMES[kind]))
            ce_by_kind.append(scale * config.ce_weight * (factors.ce if factors else 1.0))
            kd_by_kind.append(scale * kd_weight * (factors.kd if factors else 1.0))
        self._ce_by_kind.copy_(torch.tensor(ce_by_kind))
        self._kd_by_kind.copy_(torch.tensor(kd_by_kind))

    def attach(self, stage: MixGPTModel, kinds: Tensor, target: Target | None, statistics: Tensor | None) -> None:
        """Make `stage`, a last one, return the loss of one micro-batch; None is cross-entropy alone. See `bind`."""
        stage.token_loss = stage.hidden_loss = None
        if isinstance(target, HiddenTarget):
            stage.hidden_loss = self.bind_hidden(kinds, target.hidden, target.head, statistics)
        elif isinstance(target, TopkTarget):
            stage.token_loss = self.bind_topk(kinds, target, statistics)
        else:
            stage.token_loss = self.bind(kinds, target.logits if target else None, statistics)

    def bind(
        self, kinds: Tensor, teacher: Tensor | None, statistics: Tensor | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of one micro-batch, to be called by the model with its logits.

        Args:
            kinds: `[b, s]` int64, kind of each label.
            teacher: `[s, b, v/tp]` teacher logits, or None for cross-entropy alone. Training writes the gradient over
                them: they must not be read again.
            statistics: `[b, len(self.statistics)]` fp64, filled with each sample's sums; None keeps none.

        Returns:
            `(logits [s, b, v/tp], labels [b, s]) -> loss [b, s]` fp32, 0 where labels are ignored.
        """

        def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
            loss, details = lssd_loss(
                logits,
                teacher,
                labels.t(),
                grad_buffer="teacher" if teacher is not None and logits.requires_grad else "new",
                **self._options(kinds),
            )
            _record(statistics, labels, loss, details)
            return loss.t()

        return token_loss

    def bind_hidden(
        self, kinds: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, statistics: Tensor | None
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`bind`, from hidden states and output heads: the logits exist a chunk of tokens at a time.

        Args:
            teacher_hidden: `[s(/tp), b, h]`, sharded over the sequence where the student's are.
            teacher_head: `[v/tp, h]`.

        Returns:
            `(hidden [s(/tp), b, h], head [v/tp, h], labels [b, s]) -> loss [b, s]` fp32.
        """

        def hidden_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
            loss, details = linear_lssd_loss(
                hidden,
                head,
                teacher_hidden,
                teacher_head,
                labels.t(),
                sequence_parallel=hidden.shape[0] != labels.shape[1],
                **self._options(kinds),
            )
            _record(statistics, labels, loss, details)
            return loss.t()

        return hidden_loss

    def bind_topk(
        self, kinds: Tensor, teacher: TopkTarget, statistics: Tensor | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`bind`, from a teacher of which only the most likely tokens and the labels' log-probabilities are known."""

        def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
            loss, details = topk_lssd_loss(
                logits, teacher.ids, teacher.logp, teacher.gold_logp, labels.t(), **self._options(kinds)
            )
            _record(statistics, labels, loss, details)
            return loss.t()

        return token_loss

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
