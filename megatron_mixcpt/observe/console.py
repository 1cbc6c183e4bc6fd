"""The line a step prints: everything one looks for while a run goes on, in the order one looks for it."""

from __future__ import annotations

import sys
import time
from typing import Any

from megatron_mixcpt.progress import Display
from megatron_mixcpt.units import duration

HISTORY = 5.0  # seconds between lines that stay on a terminal; a log has one for each step
EMA_DECAY = 0.9


class TrainConsole:
    """Progress of training: a bar with the newest line on a terminal, a line a step in a log."""

    def __init__(self, steps: int, start_step: int) -> None:
        self.steps = steps
        self._start, self._start_step = time.monotonic(), start_step
        self._kept, self._ema = 0.0, None
        self._display = Display(sys.stdout)
        self.message = self._display.message
        self.close = self._display.close

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """`step`: steps done; `metrics`: names as in metrics.jsonl."""
        loss = metrics["train/loss"]
        if loss is not None:  # of a step that was not finite, and not taken
            self._ema = loss if self._ema is None else EMA_DECAY * self._ema + (1 - EMA_DECAY) * loss
        now = time.monotonic()
        keep = not self._display.is_terminal or now - self._kept >= HISTORY or step == self.steps
        if keep:
            self._kept = now
        self._display.show(step / self.steps, self._parts(step, metrics), keep=keep)

    def _parts(self, step: int, metrics: dict[str, Any]) -> list[str]:
        parts = [
            f"step {step}/{self.steps} ({step / self.steps:.1%})",
            f"loss {_fixed(metrics['train/loss'])} (ema {_fixed(self._ema)})",
        ]
        own = {name.removeprefix("train/"): value for name, value in metrics.items() if name.startswith("train/")}
        shown = [name for name in own if name not in ("tokens", "loss") and "/" not in name]
        terms = " ".join(f"{name} {_fixed(own[name])}" for name in shown if not name.endswith("_rate"))
        rates = [f"{name.removesuffix('_rate')} {_percent(own[name])}" for name in shown if name.endswith("_rate")]
        parts += [terms, *rates] if terms else rates
        if "rewards/accuracy" in metrics:
            margin = _fixed(metrics["rewards/margin"])
            parts.append(f"accuracy {_percent(metrics['rewards/accuracy'])} margin {margin}")
        parts += [f"lr {metrics['optim/lr']:.1e}", f"gnorm {_fixed(metrics['optim/grad_norm'], 2)}"]
        parts.append(f"{_thousands(metrics['speed/tok_per_s_gpu'])} tok/s/rank")
        if "speed/mfu" in metrics:
            parts.append(f"MFU {metrics['speed/mfu']:.1%}")
        parts += [f"data {metrics['speed/data_pct']:.1f}%", f"mem {metrics['mem/peak_gib']:.1f} GiB"]
        remaining = (time.monotonic() - self._start) / (step - self._start_step) * (self.steps - step)
        return [*parts, f"ETA {duration(remaining)}"]


def _fixed(number: float | None, digits: int = 3) -> str:
    """None stands for what is not finite."""
    return "nan" if number is None else f"{number:.{digits}f}"


def _percent(share: float | None) -> str:
    return "nan" if share is None else f"{share:.0%}"


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:.0f}"
