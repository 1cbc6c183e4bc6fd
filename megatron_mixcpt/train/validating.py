"""A run's validation between its steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from megatron_mixcpt.config import Config
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.train.progress import Progress
from megatron_mixcpt.train.setup import Parts
from megatron_mixcpt.train.validate import validate

INDEX_CACHE = "index_cache"  # in the run directory: in which order samples are read


class RunValidation:
    """Validates every source and tells `progress`. All methods are collective.

    Args:
        beat: told before each micro-batch what is being done.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        state: ParallelState,
        progress: Progress,
        stop: StopRequest,
        beat: Callable[[str], None],
    ) -> None:
        self._config, self._parts, self._state = config, parts, state
        self._progress, self._stop, self._beat = progress, stop, beat
        self._datasets = parts.task.valid_datasets(config.train.seed, Path(config.run_dir) / INDEX_CACHE)

    def __call__(self, step: int, *, saves: bool = False) -> bool:
        """After `step` steps; whether some rank was asked to stop meanwhile, which cuts it short.

        Args:
            saves: a checkpoint of this step is due.
        """
        metrics, items, stopping = self.measure(f"validation after step {step}")
        self._progress.validated(step, metrics, items, whole=not stopping, saves=saves)
        return stopping

    def measure(self, phase: str) -> tuple[dict[str, float], dict[str, Tensor], bool]:
        """The model as it is: metrics, each source's sums by held-out sample, and whether a stop cut it short."""
        items: dict[str, Tensor] = {}

        def stop_requested() -> bool:
            self._beat(phase)
            return self._stop.agreed(self._state.device)

        metrics, stopping = validate(
            self._datasets,
            self._parts.validation,
            self._parts.task.collate,
            state=self._state,
            micro_batch_size=self._config.train.micro_batch_size,
            max_samples=self._config.eval.max_samples,
            stop_requested=stop_requested,
            items=items,
        )
        return metrics, items, stopping
