"""Validation: the objective on each source's held-out split."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.data import Dataset

from megatron_mixcpt.data.batch import Batch, valid_batches
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.runtime.timing import section
from megatron_mixcpt.train.step import ForwardBackward


@torch.no_grad()
@section("validation")
def validate(
    datasets: Mapping[str, Dataset],
    run: ForwardBackward,
    collate: Callable[[list[dict]], Batch],
    *,
    state: ParallelState,
    micro_batch_size: int,
    max_samples: int | None,
    stop_requested: Callable[[], bool],
) -> tuple[dict[str, float], bool]:
    """`{"val/<source>/<name>": value}` with the objective's names and values, the same on every rank.

    Sources with nothing to learn in their validation split are left out. Asks `stop_requested` (collective) after each
    micro-batch; where it says so, returns the sources that are complete, and True.
    """
    run.model.eval()
    metrics: dict[str, float] = {}
    stopping = False
    for name, dataset in datasets.items():
        totals = torch.zeros(len(run.objective.statistics), dtype=torch.float64, device=state.device)
        for indices in valid_batches(
            dataset,
            max_samples=max_samples,
            micro_batch_size=micro_batch_size,
            data_rank=state.data_rank,
            data_size=state.data_size,
        ):
            batch = collate([dataset[index] for index in indices]).to(state.device)
            totals += run([batch], forward_only=True).sum(0)
            stopping = stop_requested()
            if stopping:
                break
        if stopping:
            break
        torch.distributed.all_reduce(totals)
        metrics |= {
            f"val/{name}/{key}": value for key, value in run.objective.validation_metrics(totals.tolist()).items()
        }
    run.model.train()
    return metrics, stopping
