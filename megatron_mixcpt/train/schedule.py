"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megatron_mixcpt.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Linear warm-up to `lr` over `warmup_steps`, then down to `min_lr`, reached after the last step: by half a cosine, or
    (wsd) constant followed by a linear decay over the last `decay_fraction` of all steps, or not at all (constant).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        begin = config.warmup_steps
    else:
        begin = max(config.warmup_steps, config.steps - round(config.decay_fraction * config.steps))
    progress = min(max((step - begin) / max(config.steps - begin, 1), 0.0), 1.0)
    remaining = (1.0 + math.cos(math.pi * progress)) / 2.0 if config.schedule == "cosine" else 1.0 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining
