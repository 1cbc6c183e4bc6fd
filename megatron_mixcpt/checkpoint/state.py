"""What a checkpoint holds, and how it comes back in any layout.

Saved: weights, optimizer state (fp32 master weights, moments, step) and `checkpoint.json`, in which the trainer keeps
counters, data position and mixture. Not saved, because they are functions of the step and the configuration: learning
rate, random numbers (training draws none).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_mixcpt.checkpoint.info import FORMAT, CheckpointInfo, TrainingState, read_info
from megatron_mixcpt.checkpoint.optimizer_state import (
    assert_steps_are_separate,
    optimizer_step_count,
    set_step_count,
)
from megatron_mixcpt.checkpoint.reading import read_boxes
from megatron_mixcpt.checkpoint.saver import Saver
from megatron_mixcpt.checkpoint.shares import needed_here, replicas
from megatron_mixcpt.errors import MixcptError, VerificationError


def save_checkpoint(
    parent: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer | None = None,
    *,
    training: TrainingState | None = None,
    keep: int | None = None,
) -> Path:
    """Write `<parent>/step_<step>`, collectively; returns when it is complete and visible. Arguments: see Saver.

    Raises MixcptError, on every rank, where it could not be written.
    """
    saver = Saver(parent, keep=keep)
    saver.begin(step, model, optimizer, training)
    outcome = saver.finish()
    assert outcome is not None
    if outcome.path is None:
        raise MixcptError(f"the checkpoint of step {step} was not saved: {outcome.error}")
    return outcome.path


def load_checkpoint(checkpoint: Path, model: torch.nn.Module, optimizer: MegatronOptimizer) -> CheckpointInfo:
    """Restore weights and optimizer state in place, collectively and in any layout.

    The caller has verified the checkpoint (`newest_good`, `find_checkpoint`). Raises VerificationError where it holds
    no optimizer state or its step count does not come back.
    """
    info = read_info(checkpoint)
    step = info.optimizer_step
    if step is None:
        raise VerificationError(f"{checkpoint}: holds weights only, so training cannot resume from it")
    _read(checkpoint, unwrap_model(model).sharded_state_dict(), optimizer, info.format)
    set_step_count(optimizer, step)
    assert_steps_are_separate(optimizer)
    restored = optimizer_step_count(optimizer)
    if restored != step:
        raise VerificationError(f"{checkpoint}: optimizer step {step} was restored as {restored}")
    return info


def load_weights(stage: Any, checkpoint: Path) -> None:
    """Fill this rank's shard of the weights from a verified checkpoint that holds them, in any layout. Collective."""
    _read(checkpoint, stage.weights_sharded_state_dict(), None)


def _read(checkpoint: Path, state: dict[str, Any], optimizer: MegatronOptimizer | None, format: str = FORMAT) -> None:
    """Fill what `state` and `optimizer` have here. Collective; errors as `read_boxes`."""
    over_ranks = parallel_state.get_expert_model_parallel_world_size() > 1
    for of_experts in (False, True) if over_ranks else (False,):
        needed = needed_here(state, optimizer, format, of_experts=of_experts)
        read_boxes(checkpoint, needed, replicas(of_experts=of_experts))
