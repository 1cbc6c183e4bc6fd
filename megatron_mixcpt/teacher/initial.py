"""The teacher of Mix-CPT: the model as it was before training, frozen.

Shapes: s sequence, b micro-batch, h hidden, v vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.model.base_routing import BaseRouting
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.teacher.interface import DenseTarget, HiddenTarget, Target


class ModelTeacher:
    """A model of ours, sharded like the student, that answers without gradient.

    Without pipeline parallelism it is run when the loss asks for its target. With it, `begin_step` first sends all
    micro-batches of the step through the teacher's pipeline and keeps the last hidden states (h values a token instead
    of v logits); the output head is applied when the loss asks.

    Args:
        model: this rank's pipeline stage, or its parts in the interleaved schedule.
        pipelined: whether the model is spread over several pipeline stages.
        fused: answer with hidden states and output head (`loss.fuse_lm_head`) instead of logits.
        routing: keeps which experts it sends tokens to, where it is a mixture of experts.
    """

    def __init__(
        self, model: StageModel, *, pipelined: bool, fused: bool = False, routing: BaseRouting | None = None
    ) -> None:
        self.model, self._routing = model, routing
        self._pipelined, self._fused = pipelined, fused
        self._hidden: list[Tensor] = []

    def as_teacher(self) -> AbstractContextManager[None]:
        """Whatever makes the model the teacher; a teacher that shares the student's weights overrides it."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _passing(self) -> Iterator[None]:
        """Open around every pass."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.as_teacher())
            if self._routing is not None:
                assert self.model.routing is not None
                stack.enter_context(self.model.routing.telling(self._routing))
            yield

    @torch.no_grad()
    def begin_step(self, batches: list[Batch]) -> None:
        """Collective over the pipeline: prepare for the `batches` of one step."""
        if not self._pipelined:
            return
        parts = self.model.parts
        with self._passing():
            self._hidden = get_forward_backward_func()(
                forward_step_func=self._keep_hidden,
                data_iterator=[iter(batches) for _ in parts],
                model=parts,
                num_microbatches=len(batches),
                seq_length=batches[0].tokens.shape[1],
                micro_batch_size=batches[0].tokens.shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )

    @torch.no_grad()
    def target(self, index: int, batch: Batch) -> Target:
        with self._passing():
            hidden = self._hidden_states(index, batch)  # [s(/tp), b, h]
            if self._fused:
                return HiddenTarget(hidden, self.model.head_weight())
            return DenseTarget(self.model.output_logits(hidden))

    def _hidden_states(self, index: int, batch: Batch) -> Tensor:
        if self._pipelined:
            hidden, self._hidden[index] = self._hidden[index], None  # type: ignore[call-overload]
            return hidden
        (model,) = self.model.parts
        return model.hidden(batch.tokens, batch.position_ids, batch.packing)

    @staticmethod
    def _keep_hidden(batches: Iterator[Batch], model: MixGPTModel) -> tuple[Tensor, Any]:
        batch = next(batches).here(next(model.parameters()).device)
        hidden = model.hidden(batch.tokens, batch.position_ids, batch.packing)  # [s(/tp), b, h]
        return hidden, lambda output, non_loss_data: output


class InitialTeacher(ModelTeacher):
    """A copy of the starting weights, frozen and in evaluation mode."""

    def __init__(
        self, model: StageModel, *, pipelined: bool, fused: bool = False, routing: BaseRouting | None = None
    ) -> None:
        super().__init__(model.requires_grad_(False).eval(), pipelined=pipelined, fused=fused, routing=routing)
