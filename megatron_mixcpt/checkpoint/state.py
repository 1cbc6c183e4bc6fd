"""What a checkpoint holds, and how it is written to and read from any layout.

Saved: weights, optimizer state (fp32 master weights, moments, step) and `checkpoint.json`. Not saved, because they are
functions of the step and the configuration: learning rate, data position, random numbers (training draws none).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_mixcpt import __version__
from megatron_mixcpt.checkpoint.optimizer_state import (
    load_optimizer_state,
    optimizer_sharded_state,
    optimizer_step_count,
)
from megatron_mixcpt.checkpoint.store import FORMAT, commit, find_checkpoint, new_directory, read_info
from megatron_mixcpt.errors import VerificationError
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
    """Write `<parent>/step_<step>`, collectively; returns when it is complete and visible.

    Args:
        model: this rank's stage, bare or wrapped.
        optimizer: None saves weights alone.
        info: entries added to `checkpoint.json` (JSON types).
        keep: afterwards remove all but the newest `keep` checkpoints of `parent`.
    """
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    rank = torch.distributed.get_rank()
    names = [str(new_directory(parent, step)) if rank == 0 else None]
    torch.distributed.broadcast_object_list(names, src=0)
    temporary = Path(str(names[0]))

    state = unwrap_model(model).sharded_state_dict()
    sharded: dict[str, Any] = {"model": state}
    if optimizer is not None:
        sharded["optimizer"] = optimizer_sharded_state(optimizer, state, loading=False)
    dist_checkpointing.save(sharded, str(temporary))
    final = temporary.with_name(temporary.name.split(".tmp.")[0])
    if rank == 0:
        description = {
            "format": FORMAT,
            "version": __version__,
            "step": step,
            "architecture": arch.to_dict(),
            "optimizer_step": None if optimizer is None else optimizer_step_count(optimizer),
            **(info or {}),
        }
        commit(temporary, description, keep)
    torch.distributed.barrier()
    return final


def load_checkpoint(checkpoint: Path, model: torch.nn.Module, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Restore weights and optimizer state in place, collectively and in any layout; returns `checkpoint.json`.

    Raises VerificationError where the checkpoint holds no optimizer state or its step count does not come back.
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
    restored = optimizer_step_count(optimizer)
    if restored != step:
        raise VerificationError(f"{checkpoint}: optimizer step {step} was restored as {restored}")
    return info


def load_model_weights(model: torch.nn.Module, run_or_checkpoint: Path) -> dict[str, Any]:
    """Fill this rank's shard from a checkpoint or the newest one of a run, in any layout; returns `checkpoint.json`."""
    checkpoint = find_checkpoint(run_or_checkpoint)
    stage = unwrap_model(model)
    loaded = dist_checkpointing.load({"model": stage.sharded_state_dict()}, str(checkpoint))
    stage.load_state_dict(loaded["model"])
    return read_info(checkpoint)
