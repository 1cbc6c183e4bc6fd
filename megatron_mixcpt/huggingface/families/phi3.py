"""Phi-3, Phi-4 and Phi-4-mini (https://arxiv.org/abs/2404.14219): Llama with fused projections; a part of each head may
rotate, and longrope."""

from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.families.family import Family, Names

NAMES: dict[str, Names] = {
    "self_attention.linear_qkv.weight": ("self_attn.qkv_proj.weight",) * 3,
    "mlp.linear_fc1.weight": ("mlp.gate_up_proj.weight",) * 2,
}


def _write(arch: Architecture) -> dict[str, Any]:
    entries: dict[str, Any] = {"sliding_window": arch.sliding_window, "pad_token_id": None}
    if arch.rope_scaling is not None:
        entries["original_max_position_embeddings"] = arch.rope_scaling.original_max_position_embeddings
    return entries


FAMILY = Family("phi3", "Phi3ForCausalLM", {}, NAMES, write=_write, partial_rotary=True)
