"""Where `teacher.source` becomes a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.huggingface.weights import DTYPES
from megatron_mixcpt.model.base_routing import BaseRouting
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.model.stage import Stage
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.teacher.adapter_off import AdapterOffTeacher
from megatron_mixcpt.teacher.cached import CachedTeacher, open_cache
from megatron_mixcpt.teacher.identity import refuse_other_weights, teacher_identity
from megatron_mixcpt.teacher.initial import InitialTeacher
from megatron_mixcpt.teacher.interface import Teacher


def check_teacher(config: Config, arch: Architecture, mix: Mix) -> None:
    """Raise ConfigError or VerificationError, before any process starts, where the teacher cannot be right."""
    if config.teacher.hf is not None:
        from megatron_mixcpt.teacher.deepspeed import check_hf_teacher

        check_hf_teacher(config.teacher, mix)
    if config.teacher.source == "cached":
        open_cache(config, arch, mix)


def build_teacher(
    config: Config, state: ParallelState, mix: Mix, stage: Stage, empty_stage: Callable[[], StageModel]
) -> Teacher | None:
    """The configuration's teacher; None where the loss needs none. Collective.

    Args:
        mix: what is trained on.
        stage: the student's, at the starting weights.
        empty_stage: makes another one like it, with uninitialised weights.

    Raises ConfigError where the teacher does not belong to the model or the data.
    """
    if not config.uses_teacher:
        return None
    if config.teacher.source == "cached":
        assert config.teacher.cache is not None
        cache = Path(config.teacher.cache)
        identity = open_cache(config, stage.model.arch, mix)
        refuse_other_weights(cache, identity, teacher_identity(config, stage.start.weights))
        return CachedTeacher(cache, identity, mix, reads=state.is_last_stage)
    if config.teacher.source == "deepspeed":
        return build_hf_teacher(config, state, stage.model.arch)
    base = None
    if stage.model.routing is not None:
        base = stage.model.routing.base = BaseRouting()
    pipelined, fused = state.pipeline_size > 1, config.loss.fuse_lm_head
    if config.teacher.source == "adapter_off":
        return AdapterOffTeacher(stage.model, pipelined=pipelined, fused=fused, routing=base)
    copy = empty_stage()
    copy.load_state_dict(stage.model.state_dict())
    return InitialTeacher(copy, pipelined=pipelined, fused=fused, routing=base)


def build_hf_teacher(config: Config, state: ParallelState, arch: Architecture) -> Teacher:
    """The model of `teacher.hf`, for a student of architecture `arch`. Collective; raises ConfigError."""
    from megatron_mixcpt.teacher.deepspeed import DeepSpeedTeacher

    width = arch.padded_vocab_size(state.tensor_size) // state.tensor_size
    return DeepSpeedTeacher(
        config.teacher, state, vocab_start=state.tensor_rank * width, width=width, dtype=DTYPES[config.train.dtype]
    )
