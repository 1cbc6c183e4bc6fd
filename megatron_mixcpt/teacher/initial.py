"""The teacher of Mix-CPT: the model as it was before training, frozen.

Shapes: s sequence, b micro-batch, h hidden, v vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.model.gpt import MixGPTModel


class InitialTeacher:
    """A frozen copy of the starting weights, sharded like the student.

    Without pipeline parallelism its logits are computed when the loss asks for them. With it, `begin_step` first sends
    all micro-batches of the step through the teacher's pipeline and keeps the last hidden states (h values a token
    instead of v logits); the output head is applied when the loss asks.

    Args:
        model: this rank's pipeline stage of the copy. It is frozen and put into evaluation mode.
        pipelined: whether the model is spread over several pipeline stages.
    """

    def __init__(self, model: MixGPTModel, *, pipelined: bool) -> None:
        self.model = model.requires_grad_(False).eval()
        self.model.token_loss = lambda logits, labels: logits
        self._pipelined = pipelined
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def begin_step(self, batches: list[Batch]) -> None:
        """Collective over the pipeline: prepare for the `batches` of one step."""
        if not self._pipelined:
            return
        self._hidden = get_forward_backward_func()(
            forward_step_func=self._keep_hidden,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )

    @torch.no_grad()
    def logits(self, index: int, batch: Batch) -> Tensor:
        """Logits `[s, b, v/tp]` of micro-batch `index` of the step; last pipeline stage only, once an index."""
        if self._pipelined:
            return self.model.output_logits(self.hidden(index, batch))
        return self.model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels)

    @torch.no_grad()
    def hidden(self, index: int, batch: Batch) -> Tensor:
        """Last hidden states `[s(/tp), b, h]`, as `logits`; with `head` they give the logits."""
        if self._pipelined:
            hidden, self._hidden[index] = self._hidden[index], None  # type: ignore[call-overload]
            return hidden
        return self.model.hidden(batch.tokens, batch.position_ids, batch.attention_mask)

    @property
    def head(self) -> Tensor:
        """Weight `[v/tp, h]` of the output head; last pipeline stage only."""
        return self.model.head_weight()

    @staticmethod
    def _keep_hidden(batches: Iterator[Batch], model: MixGPTModel) -> tuple[Tensor, Any]:
        batch = next(batches)
        hidden = model.hidden(batch.tokens, batch.position_ids, batch.attention_mask)  # [s(/tp), b, h]
        return hidden, lambda output, non_loss_data: output
