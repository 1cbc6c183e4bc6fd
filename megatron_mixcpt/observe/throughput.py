"""Model FLOPs of a step and the share of the device's peak they reach (MFU)."""

from __future__ import annotations

import resource

import torch

from megatron_mixcpt.model.architecture import Architecture

# Dense bf16 peak in FLOP/s, from the vendors' data sheets; the first name contained in the device's name counts.
PEAK_BF16 = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def flops_per_token(arch: Architecture, seq_length: int, *, with_teacher: bool) -> float:
    """Model FLOPs to train on one token: 6 a matrix weight plus causal attention, and a third more for a teacher.

    Counts what the mathematics needs (PaLM, arXiv 2204.02311, appendix B), not recomputation; attention over packed
    documents is counted as one document, an upper bound.
    """
    embedding = arch.vocab_size * arch.hidden_size
    matrices = arch.num_parameters - embedding * (0 if arch.tie_word_embeddings else 1)
    attention = arch.num_layers * arch.num_attention_heads * arch.head_dim * seq_length  # q k^T and a v, half masked
    return (6.0 * matrices + 6.0 * attention) * (4.0 / 3.0 if with_teacher else 1.0)


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device, or None where it is not known (then there is no MFU, not an MFU of 0)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: of the device, or on CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
