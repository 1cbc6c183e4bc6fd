"""This rank's part of the model, on any process grid."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_mixcpt.adapters.layout import check_adapter_layout
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.init import initialize
from megatron_mixcpt.architecture.stages import Stages, balanced
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.model.experts import routers_of
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.model.interleaved import InterleavedModel, StageModel
from megatron_mixcpt.model.place import place_here
from megatron_mixcpt.model.routing import RouterSettings, Routing
from megatron_mixcpt.model.specs import transformer_config
from megatron_mixcpt.runtime.timing import MegatronTimers

ROUTER = RouterSettings()


def build_gpt(
    arch: Architecture,
    sequence_parallel: bool = False,
    params_dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    seed: int | None = 1234,
    adapter: AdapterConfig | None = None,
    stages: Stages | None = None,
    router: RouterSettings = ROUTER,
) -> StageModel:
    """Build this rank's pipeline stage on its device, inside `parallel_context`.

    Args:
        sequence_parallel: split norms and residuals over the sequence; without tensor parallelism it does nothing.
        params_dtype: type of weights and activations.
        recompute: what is not kept for backward, as `train.recompute`.
        seed: of the random weights, which are the same on every grid; None leaves all but the vocabulary's padding
            uninitialised, for weights that are loaded next.
        adapter: put these adapters beside the layers and freeze all else; their values are left uninitialised.
        stages: which layers lie on which rank; balanced by cost when not given.
        router: whether what sends tokens to experts is trained, and how.

    Raises:
        ConfigError: the model cannot be cut this way; the message says which ways work.
    """
    place = place_here()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    interleave = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    arch.check_layout(place.tensors, pipeline, interleave or 1, place.experts)
    stages = stages or balanced(arch, pipeline, interleave or 1)
    if adapter is not None:
        check_adapter_layout(arch, adapter, place.tensors, stages)
    settings = transformer_config(
        arch, stages, sequence_parallel=sequence_parallel, params_dtype=params_dtype, recompute=recompute
    )
    settings.timers = MegatronTimers()
    parts = [
        MixGPTModel(arch, stages, settings, adapter, recompute=recompute, part=part)
        for part in (range(interleave) if interleave else [None])
    ]
    if arch.num_experts:
        routing = Routing(arch, router, sequence_parallel=settings.sequence_parallel)
        for part in parts:
            part.routing = routing
            for module in routers_of(part):
                module.routing = routing
                module.weight.requires_grad_(router.trained and adapter is None)
    model: StageModel = InterleavedModel(parts) if interleave else parts[0]
    if seed is not None:
        initialize(model.slots(), arch, seed, place)
    else:
        model.zero_padding()
    return model
