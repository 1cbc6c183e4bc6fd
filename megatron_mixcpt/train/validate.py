"""Validation: cross-entropy of each source's held-out split."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_mixcpt.data.batch import collate, valid_batches
from megatron_mixcpt.data.dataset import TokenFlagsDataset
from megatron_mixcpt.parallel import ParallelState
from megatron_mixcpt.train.step import ForwardBackward


@torch.no_grad()
def validate(
    datasets: dict[str, TokenFlagsDataset],
    run: ForwardBackward,
    *,
    state: ParallelState,
    micro_batch_size: int,
    max_samples: int | None,
    stop_requested: Callable[[], bool],
) -> tuple[dict[str, float], bool]:
    """`{"val/<source>/loss": nats a target token, "val/<source>/ppl": ...}`, the same on every rank.

    Sources without a target token in their validation split are left out. Asks `stop_requested` (collective) after each
    micro-batch; where it says so, returns the sources that are complete, and True.
    """
    run.model.eval()
    statistics = run.loss.statistics
    metrics: dict[str, float] = {}
    stopping = False
    for name, dataset in datasets.items():
        totals = torch.zeros(len(statistics), dtype=torch.float64, device=state.device)
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
        tokens, ce = totals[statistics.index("tokens")].item(), totals[statistics.index("ce")].item()
        if tokens > 0:
            metrics[f"val/{name}/loss"] = ce / tokens
            metrics[f"val/{name}/ppl"] = math.exp(min(ce / tokens, 700.0))  # beyond, a float overflows
    run.model.train()
    return metrics, stopping
