"""Random weights that are the same on every process grid, so that layouts can be compared without a checkpoint."""

import hashlib
import math

import torch

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import Place, Slot, shard


def initial_tensor(name: str, shape: tuple[int, ...], arch: Architecture, seed: int) -> torch.Tensor:
    """The tensor drawn from a generator of its own, seeded by its name."""
    if "layernorm" in name:
        plus_one = arch.norm_plus_one and not name.endswith("weight_of_heads")
        return torch.zeros(shape) if plus_one else torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    std = arch.initializer_range
    if "linear_proj" in name or "linear_fc2" in name:
        std /= math.sqrt(2 * arch.num_layers)  # as GPT-2: keeps the residual stream's variance over depth
    return torch.empty(shape).normal_(0.0, std, generator=named_generator(name, seed))


def named_generator(name: str, seed: int) -> torch.Generator:
    """Random numbers that depend on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialize(slots: list[Slot], arch: Architecture, seed: int, place: Place) -> None:
    """Fill every parameter in place: normal weights (drawn in fp32), unit norms, zero biases, zero padding rows."""
    padded = arch.padded_vocab_size(place.tensors)
    for slot in slots:
        whole = initial_tensor(slot.name, slot.shape, arch, seed)
        slot.parameter.copy_(shard(slot.name, whole, place, padded))
