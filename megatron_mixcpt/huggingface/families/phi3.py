"""Phi-3, Phi-4 and Phi-4-mini (https://arxiv.org/abs/2404.14219): Llama with fused projections; a part of each head may
rotate, and longrope."""

from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.families.family import Family, Names
from megatron_mixcpt.huggingface.rotary import follows_from_contexts

NAMES: dict[str, Names] = {
    "self_attention.linear_qkv.weight": ("self_attn.qkv_proj.weight",) * 3,
    "mlp.linear_fc1.weight": ("mlp.gate_up_proj.weight",) * 2,
}


def _write(arch: Architecture) -> dict[str, Any]:
    entries: dict[str, Any] = {"sliding_window": arch.sliding_window, "pad_token_id": None}
    scaling = arch.rope_scaling
    if scaling is not None:
        entries["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        if follows_from_contexts(scaling, arch.max_position_embeddings):
            # All that transformers 4 admits; with an attention factor of the model's own it must refuse, not ignore it.
            factors = {"short_factor": scaling.short_factor, "long_factor": scaling.long_factor}
            entries["rope_scaling"] = {"type": "longrope", **factors}
    return entries


FAMILY = Family("phi3", "Phi3ForCausalLM", {}, NAMES, write=_write, windows="every", partial_rotary=True)
