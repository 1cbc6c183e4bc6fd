"""`train.profile`: a torch profiler trace of a few steps, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_mixcpt.config import ProfileConfig
from megatron_mixcpt.runtime.timing import StepTimer


class StepProfiler:
    """Traces steps `start` to `start + steps - 1` into `<folder>/steps_<first>-<last>.rank<n>.json.gz`.

    One rank of every pipeline stage traces (data- and tensor-parallel rank 0): the others do the same. A profiler that
    fails, or a disk that is full, is told and changes nothing else.

    Args:
        config: None never traces.
        timer: its sections become labels in the trace.
    """

    def __init__(
        self, config: ProfileConfig | None, folder: Path, rank: int, *, traces: bool, timer: StepTimer
    ) -> None:
        self._config = config if traces else None
        self._folder, self._rank, self._timer = folder, rank, timer
        self._profile: profile | None = None
        self._first = self._last = 0

    def begin(self, step: int) -> None:
        """Before step `step` (from 1)."""
        config = self._config
        if config is None or self._profile is not None or not config.start <= step < config.start + config.steps:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._first = step
        try:
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        except RuntimeError as error:
            self._fail(error)
            return
        self._timer.label = record_function

    def end(self, step: int) -> str | None:
        """After step `step`; what the user should know, if anything."""
        self._last = step
        if self._profile is None or self._config is None or step < self._config.start + self._config.steps - 1:
            return None
        return self.close()

    def close(self) -> str | None:
        """Write what has been traced, where the run ends before the last step that was asked for too."""
        traced, self._profile = self._profile, None
        self._timer.label = lambda name: nullcontext()
        if traced is None:
            return None
        path = self._folder / f"steps_{self._first}-{self._last}.rank{self._rank}.json.gz"
        try:
            traced.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(path))
        except (RuntimeError, OSError) as error:
            self._fail(error)
            return None
        self._config = None
        return f"profile: {path}"

    def _fail(self, error: Exception) -> None:
        self._profile, self._config = None, None
        print(f"warning: rank {self._rank}: no profile, training goes on: {error}", file=sys.stderr)
