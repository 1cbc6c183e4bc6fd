"""Checkpoints: written so that they are whole or absent, read in any TP x PP x DP layout."""

from megatron_mixcpt.checkpoint.state import load_checkpoint, load_model_weights, save_checkpoint
from megatron_mixcpt.checkpoint.store import find_checkpoint, list_checkpoints, read_info

__all__ = [
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_model_weights",
    "read_info",
    "save_checkpoint",
]
