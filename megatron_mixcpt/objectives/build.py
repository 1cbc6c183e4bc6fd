"""The task of a run, by its kind of training, which follows from the configuration alone."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.model.stage import Stage
from megatron_mixcpt.objectives.dpo import build_dpo
from megatron_mixcpt.objectives.packed_text import build_packed_text, read_text_mix
from megatron_mixcpt.objectives.pairs import read_pair_mix
from megatron_mixcpt.objectives.task import Task
from megatron_mixcpt.runtime.parallel import ParallelState


def read_training_mix(config: Config) -> Mix:
    """What the configuration trains on: packed text, or rows of preference pairs. Raises ConfigError."""
    return read_pair_mix(config) if config.kind == "dpo" else read_text_mix(config)


def build_task(
    config: Config,
    mix: Mix,
    arch: Architecture,
    stage: Stage,
    state: ParallelState,
    empty_stage: Callable[[], StageModel],
    heartbeat: Callable[[str], None],
) -> Task:
    """The configuration's task, with its teacher or reference. Collective.

    Args:
        stage: holds the starting weights and is not wrapped yet.
        empty_stage: makes another one like it, with uninitialised weights.
        heartbeat: called with a few words whenever something long goes on.
    """
    if config.kind == "dpo":
        return build_dpo(config, mix, arch, stage, state, heartbeat)
    return build_packed_text(config, mix, arch, stage, state, empty_stage)
