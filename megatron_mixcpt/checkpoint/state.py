"""What a checkpoint holds, and how it comes back in any layout.

Saved: weights, optimizer state (fp32 master weights, moments, step) and `checkpoint.json`, in which the trainer keeps
counters, data position and mixture. Not saved, because they are functions of the step and the configuration: learning
rate, random numbers (training draws none).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_mixcpt.adapters.start import load_adapted
from megatron_mixcpt.checkpoint.manifest import MANIFEST
from megatron_mixcpt.checkpoint.optimizer_state import (
    assert_steps_are_separate,
    load_optimizer_state,
    optimizer_sharded_state,
    optimizer_step_count,
)
from megatron_mixcpt.checkpoint.saver import Saver
from megatron_mixcpt.checkpoint.store import read_info
from megatron_mixcpt.checkpoint.verify import find_checkpoint, silent, warn
from megatron_mixcpt.errors import MixcptError, VerificationError
from megatron_mixcpt.model.architecture import Architecture


def save_checkpoint(
    parent: Path,
    step: int,
    model: torch.nn.Module,
    arch: Architecture,
    optimizer: MegatronOptimizer | None = None,
    *,
    info: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Write `<parent>/step_<step>`, collectively; returns when it is complete and visible. Arguments: see Saver.

    Raises MixcptError, on every rank, where it could not be written.
    """
    saver = Saver(parent, keep=keep)
    saver.begin(step, model, arch, optimizer, info)
    outcome = saver.finish()
    assert outcome is not None
    if outcome.path is None:
        raise MixcptError(f"the checkpoint of step {step} was not saved: {outcome.error}")
    return outcome.path


def load_checkpoint(checkpoint: Path, model: torch.nn.Module, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Restore weights and optimizer state in place, collectively and in any layout; returns `checkpoint.json`.

    The caller has verified the checkpoint (`newest_good`, `find_checkpoint`). Raises VerificationError where it holds
    no optimizer state or its step count does not come back.
    """
    info = read_info(checkpoint)
    step = info["optimizer_step"]
    if step is None:
        raise VerificationError(f"{checkpoint}: holds weights only, so training cannot resume from it")
    state = unwrap_model(model).sharded_state_dict()
    sharded = {"model": state, "optimizer": optimizer_sharded_state(optimizer, state, loading=True)}
    loaded = dist_checkpointing.load(sharded, str(checkpoint))
    unwrap_model(model).load_state_dict(loaded["model"])
    load_optimizer_state(optimizer, loaded["optimizer"], step)
    assert_steps_are_separate(optimizer)
    restored = optimizer_step_count(optimizer)
    if restored != step:
        raise VerificationError(f"{checkpoint}: optimizer step {step} was restored as {restored}")
    return info


def load_model_weights(model: torch.nn.Module, run_or_checkpoint: Path, *, trust: bool = False) -> dict[str, Any]:
    """Fill this rank's shard from a checkpoint or the newest one of a run, in any layout; returns `checkpoint.json`.

    Collective. Verifies first; `trust` and errors as in `find_checkpoint`. Where the run trained adapters, see
    `model.adapter_start.load_adapted`.
    """
    tell = warn if torch.distributed.get_rank() == 0 else silent
    checkpoint = find_checkpoint(run_or_checkpoint, trust=trust, tell=tell, together=True)
    stage, info = unwrap_model(model), read_info(checkpoint)
    if info.get("adapter"):
        load_adapted(stage, checkpoint, info)
    else:
        loaded = dist_checkpointing.load({"model": stage.weights_sharded_state_dict()}, str(checkpoint))
        stage.load_state_dict(loaded["model"])
    manifest = checkpoint / MANIFEST
    start = xxhash.xxh3_128_hexdigest(manifest.read_bytes()) if manifest.exists() else None
    return {**info, "start": start}
