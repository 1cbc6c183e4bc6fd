"""Descriptions of checkpoints as a run writes them, without a run."""

from megatron_mixcpt.architecture.architecture import PRESETS
from megatron_mixcpt.checkpoint import CheckpointInfo, TrainingState
from megatron_mixcpt.model.stage import Start


def training_state(**entries):
    values = {
        "seq_length": 32,
        "tokenizer_hash": "0",
        "dtype": "fp32",
        "global_batch_size": 8,
        "data": {"seed": 1, "sources": {}},
        "guard": {"skipped": 0, "in_a_row": 0, "losses": [], "norms": []},
        "tokens_by_source": {},
        "sample_stream": "",
        "layout": {"world_size": 1, "tensor": 1},
        "kind": "train",
        "steps": 100,
        "validated": True,
        "start": Start(),
    }
    return TrainingState(**(values | entries))


def checkpoint_info(step, **entries):
    """Of a run; keyword arguments are entries of its TrainingState."""
    return CheckpointInfo(step, PRESETS["tiny"], step, training=training_state(**entries))
