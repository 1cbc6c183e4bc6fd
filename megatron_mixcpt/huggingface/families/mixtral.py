"""Mixtral (https://arxiv.org/abs/2401.04088): Mistral with experts in every layer."""

from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.families.family import Family, Names

NAMES: dict[str, Names] = {
    "mlp.router.weight": ("block_sparse_moe.gate.weight",),
    "mlp.experts.linear_fc1.weight": (
        "block_sparse_moe.experts.{}.w1.weight",
        "block_sparse_moe.experts.{}.w3.weight",
    ),
    "mlp.experts.linear_fc2.weight": ("block_sparse_moe.experts.{}.w2.weight",),
}


def _read(config: Any) -> dict[str, Any]:
    return {
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_ffn_size": config.intermediate_size,
        "normalize_routing": True,
    }


def _write(arch: Architecture) -> dict[str, Any]:
    return {
        "intermediate_size": arch.expert_ffn_size,
        "num_local_experts": arch.num_experts,
        "num_experts_per_tok": arch.experts_per_token,
        "sliding_window": arch.sliding_window,
    }


FAMILY = Family("mixtral", "MixtralForCausalLM", {}, NAMES, _read, _write, windows="every")
