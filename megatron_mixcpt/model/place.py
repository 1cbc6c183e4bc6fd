"""Where this process stands among those that share the model's weights."""

from __future__ import annotations

from megatron.core import parallel_state

from megatron_mixcpt.architecture.layout import Place


def place_here() -> Place:
    """Inside `parallel_context`."""
    return Place(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        tensors=parallel_state.get_tensor_model_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_rank(),
        experts=parallel_state.get_expert_model_parallel_world_size(),
    )
