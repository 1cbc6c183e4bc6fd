"""Weights of a small mixture of experts in which no choice of experts is a near tie, which rounding would tip.

Random weights make some: among a few hundred tokens there are always two experts that are as good as equally likely,
and a router in bf16 takes another one than the oracle. So each token brings a mark along, a number for each expert in a
channel of its own, far from those of the others; layers write little into these channels, and routers look at them
first. All else, shares and gradients included, is random as elsewhere. The oracle checks what comes of it (mixture.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.init import named_generator
from megatron_mixcpt.architecture.layout import EMBEDDING, whole_shapes
from megatron_mixcpt.huggingface.names import hf_names

Weight = Callable[[str, tuple[int, ...]], Tensor]
"""(Hugging Face name, shape) -> a tensor."""

MARK = 3.0  # largest number of a mark, times the root of the layers, whose sum it has to stand out of
LOOK = 0.75  # of routers at the marks
QUIET = 0.05  # what is left of random weights where they would blur the marks
WIDTH = 64  # hidden channels, beyond which random weights are made smaller, so that their sums are not larger


def clearly_routed(weight: Weight, arch: Architecture, seed: int) -> Weight:
    """`weight` with marks, of a model whose layers have their norms before attention and experts."""
    layers, experts = range(arch.num_layers), arch.num_experts
    wholes = whole_shapes(arch)
    writers, norms = set[str](), set[str]()
    for layer in layers:
        prefix = f"decoder.layers.{layer}."
        norms |= set(hf_names(f"{prefix}pre_mlp_layernorm.weight", arch))
        for part in ("self_attention.linear_proj", "mlp.linear_fc2", "mlp.experts.linear_fc2"):
            if f"{prefix}{part}.weight" in wholes:
                writers |= set(hf_names(f"{prefix}{part}.weight", arch))
    routers, (embedding,) = router_names(arch), hf_names(EMBEDDING, arch)
    levels = MARK * math.sqrt(arch.num_layers) * torch.linspace(-1, 1, experts)

    def routed(name: str, shape: tuple[int, ...]) -> Tensor:
        value = weight(name, shape)
        if name == embedding:
            drawn = torch.rand(shape[0], experts, generator=named_generator(f"{name} marks", seed))
            value[:, :experts] += levels[drawn.argsort(1)]
        elif name in writers:
            value *= (WIDTH / max(arch.hidden_size, WIDTH)) ** 1.5
            value[:experts] *= QUIET
        elif name in norms:
            value[:experts] = 1 + QUIET * (value[:experts] - 1)
        elif name in routers:
            value *= 2 * QUIET * (WIDTH / max(arch.hidden_size, WIDTH)) ** 0.5
            value[:, :experts] += LOOK * torch.eye(experts)
        return value

    return routed


def router_names(arch: Architecture) -> set[str]:
    """Hugging Face's names of what sends tokens to experts; none in a model without them."""
    return {part for name in whole_shapes(arch) if name.endswith("router.weight") for part in hf_names(name, arch)}
