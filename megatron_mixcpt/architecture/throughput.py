"""Model FLOPs of a step and the share of the device's peak they reach (MFU)."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Mapping

import torch

from megatron_mixcpt.architecture.architecture import Architecture

# Dense bf16 peak in FLOP/s, from the vendors' data sheets; the first name contained in the device's name counts.
PEAK_BF16 = {
    "B200": 2.25e15,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def flops_per_token(
    arch: Architecture, lengths: Mapping[int, float], *, teacher: Architecture | None = None, frozen: bool = False
) -> float:
    """Model FLOPs to train on one token: three forward passes (one forward, two for the gradients) and the teacher's.

    Counts what the mathematics needs (PaLM, arXiv 2204.02311, appendix B): no recomputation, no padding of the
    vocabulary, and of attention the pairs of query and key that see each other: causal, within a document and within
    the window of layers that have one.

    Args:
        lengths: of documents, each with the share of all tokens that are in such documents.
        teacher: of the model that each token passes through as well.
        frozen: adapters are trained, the weights' own gradients not computed. What the adapters themselves take, a
            percent or so, is not counted.
    """
    matrices = _matrices(arch)
    passes = 3.0 * (matrices + _attention(arch, lengths, causal=True))
    if teacher is not None:
        passes += _matrices(teacher) + _attention(teacher, lengths, causal=True)
    return passes - (matrices if frozen else 0.0)


def executed_flops_per_token(
    arch: Architecture,
    lengths: Mapping[int, float],
    *,
    teacher: Architecture | None = None,
    recompute: str = "none",
    fuse_lm_head: bool = False,
    tensor: int = 1,
    frozen: bool = False,
) -> float:
    """FLOPs of all matrix products that training on one token runs, over all ranks of a replica.

    Beyond `flops_per_token`: layers computed again in backward, heads computed twice by the fused loss, rows that pad
    the vocabulary, and attention without a causal saving: each query meets as many keys as its document has, or the
    window of the layer.

    Args:
        lengths, teacher: as in `flops_per_token`.
        recompute: `train.recompute`.
        fuse_lm_head: `loss.fuse_lm_head`.
        tensor: tensor-parallel ranks, which decide on the padding.
        frozen: as in `flops_per_token`.
    """
    attention = _attention(arch, lengths, causal=False)
    matrices = _matrices(arch, arch.padded_vocab_size(tensor))
    again = recomputed_weights(arch, recompute) * 2.0 * arch.num_layers
    again += attention if recompute in ("attention", "full") else 0.0
    executed = 3.0 * (matrices + attention) + again
    if teacher is not None:
        executed += _matrices(teacher, arch.padded_vocab_size(tensor)) + _attention(teacher, lengths, causal=False)
    if fuse_lm_head:
        models = (arch,) if teacher is None else (arch, teacher)
        executed += sum(_head(model, arch.padded_vocab_size(tensor)) for model in models)
    return executed - (matrices if frozen else 0.0)


def _head(arch: Architecture, rows: int) -> float:
    return 2.0 * rows * arch.hidden_size


def _matrices(arch: Architecture, vocab_size: int | None = None) -> float:
    """FLOPs a token of one forward pass in all layers and the output head, attention's own left out."""
    return 2.0 * arch.num_layers * layer_weights(arch) + _head(arch, vocab_size or arch.vocab_size)


def layer_weights(arch: Architecture) -> float:
    """Weights of one layer that a token is multiplied with, on average over the layers."""
    return attention_weights(arch) + mlp_weights(arch)


def recomputed_weights(arch: Architecture, recompute: str) -> float:
    """Weights of one layer that `train.recompute` multiplies with once more."""
    return {
        "none": 0,
        "mlp": mlp_weights(arch),
        "attention": attention_weights(arch),
        "full": layer_weights(arch),
    }[recompute]


def attention_weights(arch: Architecture) -> int:
    """Of queries, keys, values and what puts the heads together again."""
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    return arch.hidden_size * (2 * queries + 2 * keys)


def mlp_weights(arch: Architecture) -> float:
    """Of gate, up and down projection, or of the router and the experts that a token goes through; on average over the
    layers."""
    dense = 3 * arch.hidden_size * arch.ffn_hidden_size
    experts = arch.hidden_size * (arch.num_experts + 3 * arch.experts_per_token * arch.expert_ffn_size)
    share = arch.num_expert_layers / arch.num_layers
    return (1 - share) * dense + share * experts


def _attention(arch: Architecture, lengths: Mapping[int, float], *, causal: bool) -> float:
    """FLOPs a token of one forward pass for q k^T and a v, with or without a causal saving."""
    keys = 0.0  # that a token's queries meet, over all layers
    for window, layers in Counter(map(arch.window, range(arch.num_layers))).items():
        for length, share in lengths.items():
            most = length if window is None else min(length, window)
            fewer = most * (most - 1) / (2 * length) if causal else 0.0  # the first ones of a document see fewer
            keys += layers * share * (most - fewer)
    return 4.0 * arch.num_attention_heads * arch.head_dim * keys


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak of one device in `train.dtype`, or None where it is not known (then there is no MFU, not an MFU of 0)."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: of the device, or on CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
