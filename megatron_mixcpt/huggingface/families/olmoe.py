"""OLMoE (https://arxiv.org/abs/2409.02060): experts in every layer, norms over all queries and keys together."""

from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.families.family import Family
from megatron_mixcpt.huggingface.families.olmo2 import NAMES as OLMO2_NAMES

FEATURES = {"qk_norm_whole": True}
NAMES = {name: parts for name, parts in OLMO2_NAMES.items() if name.endswith("weight_of_heads")}


def _read(config: Any) -> dict[str, Any]:
    if getattr(config, "clip_qkv", None) is not None:
        raise ValueError("clip_qkv is not supported")
    return {
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_ffn_size": config.intermediate_size,
        "normalize_routing": bool(config.norm_topk_prob),
    }


def _write(arch: Architecture) -> dict[str, Any]:
    return {
        "intermediate_size": arch.expert_ffn_size,
        "num_experts": arch.num_experts,
        "num_experts_per_tok": arch.experts_per_token,
        "norm_topk_prob": arch.normalize_routing,
    }


FAMILY = Family("olmoe", "OlmoeForCausalLM", FEATURES, NAMES, _read, _write)
