"""Validation: the objective on each source's held-out split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.batch import Batch, valid_batches
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.runtime.timing import section
from megatron_mixcpt.train.bookkeeping import Bookkeeping
from megatron_mixcpt.train.setup import Components

INDEX_CACHE = "index_cache"  # in the run directory: in which order samples are read


class RunValidation:
    """Validates every source and tells `bookkeeping`. All methods are collective.

    Args:
        heartbeat: told before each micro-batch what is being done.
    """

    def __init__(
        self,
        config: Config,
        components: Components,
        state: ParallelState,
        bookkeeping: Bookkeeping,
        stop: StopRequest,
        heartbeat: Callable[[str], None],
    ) -> None:
        self._config, self._components, self._state = config, components, state
        self._bookkeeping, self._stop, self._heartbeat = bookkeeping, stop, heartbeat
        self._datasets = components.task.valid_datasets(config.train.seed, Path(config.run_dir) / INDEX_CACHE)

    def __call__(self, step: int, *, saves: bool = False) -> bool:
        """After `step` steps; whether some rank was asked to stop meanwhile, which cuts it short.

        Args:
            saves: a checkpoint of this step is due.
        """
        metrics, items, stopping = self.measure(f"validation after step {step}")
        self._bookkeeping.validated(step, metrics, items, whole=not stopping, saves=saves)
        return stopping

    def measure(self, phase: str) -> tuple[dict[str, float], dict[str, torch.Tensor], bool]:
        """The model as it is: metrics, each source's sums by held-out sample, and whether a stop cut it short."""
        items: dict[str, torch.Tensor] = {}

        def stop_requested() -> bool:
            self._heartbeat(phase)
            return self._stop.agreed(self._state.device)

        metrics, stopping = validate(
            self._datasets,
            self._components.validation,
            self._components.task.collate,
            self._components.task.validation_metrics,
            state=self._state,
            micro_batch_size=self._config.train.micro_batch_size,
            max_samples=self._config.eval.limit,
            stop_requested=stop_requested,
            items=items,
        )
        return metrics, items, stopping


@torch.no_grad()
@section("validation")
def validate(
    datasets: Mapping[str, Dataset],
    run: ForwardBackward,
    collate: Callable[[list[dict]], Batch],
    measure: Callable[[Sequence[float]], dict[str, float]],
    *,
    state: ParallelState,
    micro_batch_size: int,
    max_samples: int | None,
    stop_requested: Callable[[], bool],
    items: dict[str, torch.Tensor] | None = None,
) -> tuple[dict[str, float], bool]:
    """`{"val/<source>/<name>": value}`, names and values from `measure` of the sums; the same on every rank.

    Sources with nothing to learn in their validation split are left out. Asks `stop_requested` (collective) after each
    micro-batch; where it says so, returns nothing and True: a resumed run validates anew.

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
            batch = collate([dataset[index] for index in indices])
            places = torch.tensor([num_items if index is None else index for index in indices], device=state.device)
            batch = replace(batch, source=torch.arange(len(batch.source)))
            sums[places] += run([batch], forward_only=True)[: len(places)]
            stopping = stop_requested()
            if stopping:
                break
        if stopping:
            break
        torch.distributed.all_reduce(sums)
        totals = sums[:num_items].sum(0)  # the last row is what fills up micro-batches, which has no targets
        metrics |= {f"val/{name}/{key}": value for key, value in measure(totals.tolist()).items()}
        if items is not None:
            items[name] = sums[:num_items].cpu()
    run.model.train()
    return {} if stopping else metrics, stopping
