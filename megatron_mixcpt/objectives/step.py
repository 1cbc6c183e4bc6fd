"""One forward and backward pass over a global batch, through Megatron's pipeline schedules.

Shapes: b micro-batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_mixcpt.attention.context import speaks_for_context
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.objectives.task import Objective


class ForwardBackward:
    """Runs micro-batches through the model and sums statistics by source.

    Args:
        model: this rank's stage, wrapped in Megatron's DistributedDataParallel or bare (forward only).
        objective: what is minimised.
        num_sources: rows of the returned statistics, one for each value of a batch's `source`.
        contributes: whether this rank's statistics count: one tensor-parallel rank, on the last stage.
    """

    def __init__(self, model: torch.nn.Module, objective: Objective, *, num_sources: int, contributes: bool) -> None:
        self.model, self.objective = model, objective
        self.num_sources, self.contributes = num_sources, contributes
        self._device = next(model.parameters()).device
        parts = unwrap_model(model).parts
        self._parts: list[Any] = parts if len(parts) > 1 else [model]  # of several, the wrapper is around all of them

    def __call__(self, batches: list[Batch], *, forward_only: bool = False) -> Tensor:
        """Accumulate the gradients of the mean loss over what the objective counts, globally. `batches` are on the CPU.

        The interleaved schedule takes a multiple of the pipeline's size; forward alone, the last of `batches` is
        repeated to make it one.

        Returns:
            `[num_sources, columns]` fp64 sums of this rank (columns: `objective.statistics`); all zeros where
            `contributes` is false. Summing them over all ranks gives the global batch's.
        """
        columns, count = len(self.objective.statistics), len(batches)
        if len(self._parts) > 1 and forward_only:
            batches = batches + [batches[-1]] * (-count % self._parts[0].config.pipeline_model_parallel_size)
        totals = torch.zeros(self.num_sources, columns, dtype=torch.float64, device=self._device)
        routing = unwrap_model(self.model).routing
        if routing is not None and routing.base is not None:
            routing.base.clear()
        self.objective.begin_step(batches)
        if routing is not None and not forward_only:
            routing.begin_step(self._counted(batches) if routing.has_losses else 1.0)
        get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, totals=totals, count=count),
            data_iterator=[enumerate(batches) for _ in self._parts],
            model=self._parts,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
        )
        return totals if self.contributes else torch.zeros_like(totals)

    def _counted(self, batches: list[Batch]) -> Tensor:
        """Collective over replicas: what the objective's mean is taken over, a token of the step; fp32 scalar."""
        both = torch.zeros(2, dtype=torch.float64, device=self._device)
        if speaks_for_context():  # all ranks of the group have these rows
            both[0].fill_(float(sum(self.objective.count(batch) for batch in batches)))  # no copy, which would wait
            both[1].fill_(float(sum(batch.tokens.numel() for batch in batches)))
        torch.distributed.all_reduce(both, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return (both[0] / both[1]).float()

    def routed(self) -> Tensor | None:
        """Of a mixture of experts, what this rank's routers did in the last step (`Routing.sums`)."""
        routing = unwrap_model(self.model).routing
        return None if routing is None else routing.sums()

    def _forward_step(
        self, batches: Iterator[tuple[int, Batch]], model: torch.nn.Module, *, totals: Tensor, count: int
    ) -> tuple[Tensor, Any]:
        index, batch = next(batches)
        batch = batch.here(self._device)  # no sooner: the others of the step take no room there
        stage = unwrap_model(model)
        shape = len(batch.source), len(self.objective.statistics)
        statistics = torch.zeros(shape, dtype=torch.float64, device=batch.tokens.device)
        if stage.post_process:
            self.objective.bind(stage, index, batch, statistics)
        # Last stage: the losses whose sum counts, as [b, s]; others: hidden states.
        output = model(batch.tokens, batch.position_ids, batch.packing, labels=batch.labels)
        kept = totals if index < count else torch.zeros_like(totals)  # of a repeated one nothing counts
        return output, partial(self._reduce, batch=batch, statistics=statistics, totals=kept)

    def _reduce(
        self, output: Tensor, *, batch: Batch, statistics: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, dict]:
        totals.index_add_(0, batch.source, statistics)
        return output.sum(), self.objective.count(batch), {}
