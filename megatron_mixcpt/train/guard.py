"""Which steps are taken: none that is not finite, none that is far above the recent ones.

Spikes as in OLMo 2 (arXiv 2501.00656, section 3): loss or gradient norm more than k standard deviations above the mean
of the last w steps that were taken. Skipped steps never enter the window, so neither a NaN nor a spike can poison it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megatron_mixcpt.config import TrainConfig
from megatron_mixcpt.errors import MixcptError

SMALLEST_DEVIATION = 0.01  # of the mean: in a window that hardly varies, noise is no spike


class StepGuard:
    """Decides on each step, from numbers that are the same on every rank. Its state is part of the checkpoint."""

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None = None) -> None:
        """`state`: what `state()` returned in the run that is resumed; None starts with an empty window."""
        self.config = config
        state = state or {"skipped": 0, "in_a_row": 0, "losses": [], "norms": []}
        self.skipped: int = state["skipped"]
        self.in_a_row: int = state["in_a_row"]
        self.reason = ""
        """Why the last step was skipped; empty where it was taken."""
        self._losses = deque(state["losses"], maxlen=config.spike_window)
        self._norms = deque(state["norms"], maxlen=config.spike_window)

    def admits(self, loss: float, norm: float) -> bool:
        """Whether to take the step with this mean loss and gradient norm (before clipping)."""
        self.reason = self._objection("loss", loss, self._losses) or self._objection("gradient norm", norm, self._norms)
        if self.reason:
            self.skipped += 1
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        self._losses.append(loss)
        self._norms.append(norm)
        return True

    def check(self, step: int) -> None:
        """Raise MixcptError where too many steps were skipped in a row."""
        if self.in_a_row >= self.config.max_skipped:
            raise MixcptError(
                f"step {step}: {self.in_a_row} steps in a row were skipped, the last because its {self.reason}; they "
                "changed no weight, and the last checkpoint is intact. Lower train.lr, look at the data of these "
                "steps, or, if the new level is right, set train.spike_sigmas=0"
            )

    def forget(self) -> None:
        """Empty the window: another mixture has another level."""
        self._losses.clear()
        self._norms.clear()

    def state(self) -> dict[str, Any]:
        """JSON types; floats survive JSON exactly."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def _objection(self, name: str, value: float, window: deque[float]) -> str:
        if not math.isfinite(value):
            return f"{name} is {value}"
        if self.config.spike_sigmas == 0.0 or len(window) < self.config.spike_window:
            return ""
        mean = statistics.fmean(window)
        deviation = max(statistics.pstdev(window), SMALLEST_DEVIATION * abs(mean))
        if value > mean + self.config.spike_sigmas * deviation:
            return f"{name} {value:.3g} is a spike over {mean:.3g} +- {deviation:.2g}"
        return ""
