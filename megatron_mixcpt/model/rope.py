"""Rotary position angles, looked up by position so that every packed document starts at zero."""

import math

import torch
from torch import Tensor, nn

from megatron_mixcpt.architecture.architecture import Architecture, RopeScaling
from megatron_mixcpt.attention.documents import Documents


def inverse_frequencies(arch: Architecture, *, long: bool = False) -> Tensor:
    """Radians a position for each pair of channels that rotates: fp32 `[rotary_dim / 2]`
    (https://arxiv.org/abs/2104.09864).

    Args:
        long: of documents longer than the original context, where `longrope` tells them apart.
    """
    frequencies = _frequencies(arch.rope_theta, arch.num_rotary_channels)
    if arch.rope_scaling is None:
        return frequencies
    return _scaled(frequencies, arch.rope_scaling, arch, long)


def _frequencies(theta: float, channels: int) -> Tensor:
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    return 1.0 / theta**exponents


def _scaled(frequencies: Tensor, scaling: RopeScaling, arch: Architecture, long: bool) -> Tensor:
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "longrope":
        factors = torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=torch.float32)
        return frequencies / factors
    if scaling.kind == "yarn":
        share = _interpolated(scaling, arch.rope_theta, arch.num_rotary_channels)
        return slow * share + frequencies * (1 - share)
    if scaling.kind != "llama3":
        raise ValueError(f"unknown rope scaling {scaling.kind!r}: linear, llama3, yarn and longrope are implemented")
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * slow + blend * frequencies
    return torch.where(turns < scaling.low_freq_factor, slow, torch.where(blend > 1, frequencies, blended))


def _interpolated(scaling: RopeScaling, theta: float, channels: int) -> Tensor:
    """YaRN: how far each pair of channels is slowed down, from 0 for those that turn `beta_fast` times over the
    original context to 1 for those that turn `beta_slow` times (https://arxiv.org/abs/2309.00071, section 3.2)."""

    def pair(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return channels * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    high += 0.001 * (low == high)  # a step
    return ((torch.arange(channels // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


class Rotary(nn.Module):
    """position_ids `[b, s]` -> angles `[s, b, 1, rotary_dim]` fp32, as megatron-core's attention takes them.

    Where layers with a window have a base of their own: `[2, s, b, 1, rotary_dim]`, theirs the second.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        # Not buffers: model.bfloat16() would round them, and bf16 cannot tell position 256 from 257.
        self.frequencies = inverse_frequencies(arch)
        self.long: Tensor | None = None
        self.original = 0
        if arch.rope_scaling is not None and arch.rope_scaling.kind == "longrope":
            self.long = inverse_frequencies(arch, long=True)
            self.original = arch.rope_scaling.original_max_position_embeddings
        self.local: Tensor | None = None
        if arch.local_rope_theta is not None:
            self.local = _frequencies(arch.local_rope_theta, arch.num_rotary_channels)

    def forward(self, position_ids: Tensor, packing: Documents | None = None) -> Tensor:
        """`packing`: the documents that the positions are of; `longrope` goes by their lengths."""
        if self.frequencies.device != position_ids.device:
            for name in ("frequencies", "long", "local"):
                if getattr(self, name) is not None:
                    setattr(self, name, getattr(self, name).to(position_ids.device, non_blocking=True))
        positions = position_ids.t().float().unsqueeze(-1)  # [s, b, 1]
        angles = positions * self.frequencies  # [s, b, rotary_dim / 2]
        if self.long is not None and packing is not None and packing.max_keys > self.original:
            is_long = (packing.lengths() > self.original).t().unsqueeze(-1).to(positions.device, non_blocking=True)
            angles = torch.where(is_long, positions * self.long, angles)
        if self.local is not None:
            angles = torch.stack((angles, positions * self.local))
        return torch.cat((angles, angles), dim=-1).unsqueeze(-2)
