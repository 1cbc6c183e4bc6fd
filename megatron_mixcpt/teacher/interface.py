"""What a teacher gives the loss, whatever it is: the one interface between `teacher/`, the loss and the training step.

A teacher is asked for the `target` of each micro-batch. It answers in the form in which it has its distribution, and
the loss (objectives/mixcpt.py) takes any of them; the training step knows neither teacher nor form.

Shapes: s sequence, b micro-batch, h hidden, v vocabulary, tp tensor-parallel size, k tokens that a cache kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_mixcpt.data.batch import Batch


@dataclass(frozen=True)
class DenseTarget:
    """This rank's vocabulary shard of the logits, of the student's dtype. Training writes the gradient over them: they
    are read once."""

    logits: Tensor  # [s, b, v/tp]


@dataclass(frozen=True)
class HiddenTarget:
    """What the logits are made of: they then exist a chunk of tokens at a time (`loss.fuse_lm_head`)."""

    hidden: Tensor  # [s(/tp), b, h], sharded over the sequence where the student's are
    head: Tensor  # [v/tp, h]


@dataclass(frozen=True)
class TopkTarget:
    """The most likely tokens of softmax(logits / loss.temperature) alone; the same on all tensor-parallel ranks."""

    ids: Tensor  # [s, b, k] int64, global
    logp: Tensor  # [s, b, k] fp32
    gold_logp: Tensor  # [s, b] fp32, of each label


Target = DenseTarget | HiddenTarget | TopkTarget


class Teacher(Protocol):
    """A frozen model, or what was kept of one."""

    def begin_step(self, batches: list[Batch]) -> None:
        """Prepare for the micro-batches of one step; called before the first of them on every rank (may be collective),
        and must leave the student as it was."""

    def target(self, index: int, batch: Batch) -> Target:
        """Target of micro-batch `index` of the step, once an index; on the last pipeline stage only.

        Called before the student's forward pass of that micro-batch, without gradient.
        """
