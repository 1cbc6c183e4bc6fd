"""The one place where `teacher.source` is looked at."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mixcpt.config import Config
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.parallel import ParallelState
from megatron_mixcpt.teacher.initial import InitialTeacher
from megatron_mixcpt.teacher.interface import Teacher


def build_teacher(
    config: Config, state: ParallelState, stage: MixGPTModel, empty_stage: Callable[[], MixGPTModel]
) -> Teacher | None:
    """The configuration's teacher; None where the loss needs none. Collective.

    Args:
        stage: the student's, at the starting weights.
        empty_stage: makes another one like it, with uninitialised weights.
    """
    if not config.uses_teacher:
        return None
    copy = empty_stage()
    copy.load_state_dict(stage.state_dict())
    return InitialTeacher(copy, pipelined=state.pipeline_size > 1, fused=config.loss.fuse_lm_head)
