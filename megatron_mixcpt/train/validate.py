"""Validation: the objective on each source's held-out split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.data import Dataset

from megatron_mixcpt.data.batch import Batch, valid_batches
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.runtime.timing import section
from megatron_mixcpt.train.step import ForwardBackward


@torch.no_grad()
@section("validation")
def validate(
    datasets: dict[str, Dataset],
    run: ForwardBackward,
    collate: Callable[[list[dict]], Batch],
    *,
    state: ParallelState,
    micro_batch_size: int,
    max_samples: int | None,
    stop_requested: Callable[[], bool],
    items: dict[str, torch.Tensor] | None = None,
) -> tuple[dict[str, float], bool]:
    """`{"val/<source>/<name>": value}` with the objective's names and values, the same on every rank.

    Sources with nothing to learn in their validation split are left out. Asks `stop_requested` (collective) after each
    micro-batch; where it says so, returns the sources that are complete, and True.

    Args:
        run: has at least as many rows of statistics as a micro-batch.
        items: filled with each source's sums by held-out sample, `[samples, columns]` fp64 on the CPU, on every rank.
    """
    run.model.eval()
    metrics: dict[str, float] = {}
    stopping = False
    for name, dataset in datasets.items():
        num_items = min(len(dataset), max_samples or len(dataset))  # type: ignore[arg-type]
        sums = torch.zeros(num_items + 1, len(run.objective.statistics), dtype=torch.float64, device=state.device)
        for indices in valid_batches(
            dataset,
            max_samples=max_samples,
            micro_batch_size=micro_batch_size,
            data_rank=state.data_rank,
            data_size=state.data_size,
        ):
            batch = collate([dataset[index] for index in indices]).to(state.device)
            rows = torch.arange(len(batch.source), device=state.device)
            places = torch.tensor([num_items if index is None else index for index in indices], device=state.device)
            sums[places] += run([replace(batch, source=rows)], forward_only=True)[: len(places)]
            stopping = stop_requested()
            if stopping:
                break
        if stopping:
            break
        torch.distributed.all_reduce(sums)
        totals = sums[:num_items].sum(0)  # the last row is what fills up micro-batches, which has no targets
        if items is not None:
            items[name] = sums[:num_items].cpu()
        metrics |= {
            f"val/{name}/{key}": value for key, value in run.objective.validation_metrics(totals.tolist()).items()
        }
    run.model.train()
    return metrics, stopping
