"""What a certificate can speak for: which settings it stands in for something else, and which it refuses."""

from __future__ import annotations

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import ConfigError

PRESSED = (2.0, 0.5)
"""Factors on distillation weight and learning rate that a forgetting budget is made to set after the first step."""


def refuse_what_cannot_be_certified(config: Config) -> None:
    """Raise ConfigError for settings whose result no oracle can foretell, naming what to switch off."""
    if config.adapter is not None and config.adapter.dropout > 0.0:
        raise ConfigError(
            f"adapter.dropout {config.adapter.dropout:g}: an oracle that shares no code drops other inputs: certify "
            "with adapter.dropout=0, which tries everything else of the run"
        )


def left_out(config: Config, arch: Architecture) -> tuple[str, ...]:
    """What of the settings, and of the model, takes no part, in words."""
    told = []
    if arch.rope_scaling and arch.rope_scaling.kind == "longrope":
        told.append("rotary scaling longrope: its numbers for long documents; the small run's are short")
    if config.uses_teacher and config.teacher.source == "cached":
        told.append("teacher.cache: its own answers; others are cached in 32 bits, of all tokens, so that none is lost")
    if config.uses_teacher and config.teacher.hf is not None:
        told.append("teacher.hf: a small model of the student's family stands in for it")
    if config.uses_teacher and config.teacher.offload == "nvme":
        told.append("teacher.offload nvme: cpu stands in for it")
    if config.forget is not None:
        told.append("forget: what it measures and decides; what its decisions change is compared")
    return tuple(told)


def small_stages(config: Config) -> list[int] | None:
    """Layers of each part of the small model's pipeline: one, and two where the run has more than elsewhere."""
    counts = config.parallel.layers_per_stage
    if counts is None:
        return None
    return [1 if count == min(counts) else 2 for count in counts]


def small_parts(config: Config) -> int:
    """Layers that the small model needs."""
    return sum(small_stages(config) or [1] * (config.parallel.pipeline * config.parallel.interleave))


def pressed(config: Config, step: int) -> tuple[float, float]:
    """Factors on the distillation weight and the learning rate of `step`, from 0."""
    return PRESSED if config.forget is not None and step > 0 else (1.0, 1.0)
