"""Checkpoints: written so that they are whole or absent, read in any TP x PP x DP layout."""

from typing import TYPE_CHECKING, Any

from megatron_mixcpt.checkpoint.store import find_checkpoint, list_checkpoints, read_info

if TYPE_CHECKING:
    from megatron_mixcpt.checkpoint.state import load_checkpoint, load_model_weights, save_checkpoint

__all__ = [
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_model_weights",
    "read_info",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    # megatron-core takes seconds and 200 MB, which what only looks at checkpoints on disk need not pay.
    if name in ("load_checkpoint", "load_model_weights", "save_checkpoint"):
        from megatron_mixcpt.checkpoint import state

        return getattr(state, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
