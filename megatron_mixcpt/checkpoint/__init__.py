"""Checkpoints: written so that they are whole or absent, verified before use, read in any TP x PP x DP layout."""

from typing import TYPE_CHECKING, Any

from megatron_mixcpt.checkpoint.info import CheckpointInfo, TrainingState, read_info
from megatron_mixcpt.checkpoint.store import list_checkpoints, seal
from megatron_mixcpt.checkpoint.verify import find_checkpoint, newest_checkpoint, newest_good

if TYPE_CHECKING:
    from megatron_mixcpt.checkpoint.saver import Outcome, Saver
    from megatron_mixcpt.checkpoint.state import load_checkpoint, load_weights, save_checkpoint

__all__ = [
    "CheckpointInfo",
    "Outcome",
    "Saver",
    "TrainingState",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_weights",
    "newest_checkpoint",
    "newest_good",
    "read_info",
    "save_checkpoint",
    "seal",
]


def __getattr__(name: str) -> Any:
    # megatron-core takes seconds and 200 MB, which what only looks at checkpoints on disk need not pay.
    if name in ("load_checkpoint", "load_weights", "save_checkpoint"):
        from megatron_mixcpt.checkpoint import state

        return getattr(state, name)
    if name in ("Outcome", "Saver"):
        from megatron_mixcpt.checkpoint import saver

        return getattr(saver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
