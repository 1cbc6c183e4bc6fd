"""Rotary position angles, looked up by position so that every packed document starts at zero."""

import math

import torch
from torch import Tensor, nn

from megatron_mixcpt.architecture.architecture import Architecture, RopeScaling


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Radians a position for each pair of channels: fp32 `[head_dim / 2]` (https://arxiv.org/abs/2104.09864)."""
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
    frequencies = 1.0 / arch.rope_theta**exponents
    if arch.rope_scaling is None:
        return frequencies
    return _scaled(frequencies, arch.rope_scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind != "llama3":
        raise ValueError(f"unknown rope scaling {scaling.kind!r}: linear and llama3 are implemented")
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * slow + blend * frequencies
    return torch.where(turns < scaling.low_freq_factor, slow, torch.where(blend > 1, frequencies, blended))


class Rotary(nn.Module):
    """position_ids `[b, s]` -> angles `[s, b, 1, head_dim]` fp32, as megatron-core's attention takes them."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        # Not a buffer: model.bfloat16() would round it, and bf16 cannot tell position 256 from 257.
        self.frequencies = inverse_frequencies(arch)

    def forward(self, position_ids: Tensor) -> Tensor:
        if self.frequencies.device != position_ids.device:
            self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids.t().float().unsqueeze(-1) * self.frequencies  # [s, b, head_dim / 2]
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)
