"""Qwen3's mixtures of experts (https://arxiv.org/abs/2505.09388): Qwen3 with experts in all layers, or in some."""

from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.families.family import Family


def _read(config: Any) -> dict[str, Any]:
    every, without = config.decoder_sparse_step, config.mlp_only_layers or ()
    layers = range(config.num_hidden_layers)
    return {
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_ffn_size": config.moe_intermediate_size,
        "normalize_routing": bool(config.norm_topk_prob),
        "dense_layers": tuple(n for n in layers if n in without or (n + 1) % every),
    }


def _write(arch: Architecture) -> dict[str, Any]:
    return {
        "use_sliding_window": arch.sliding_window is not None,
        "sliding_window": arch.sliding_window,
        "num_experts": arch.num_experts,
        "num_experts_per_tok": arch.experts_per_token,
        "moe_intermediate_size": arch.expert_ffn_size,
        "norm_topk_prob": arch.normalize_routing,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(arch.dense_layers),
    }


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", {"qk_norm": True}, read=_read, write=_write, windows="every")
