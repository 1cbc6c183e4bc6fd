"""Gemma 3's text models (https://arxiv.org/abs/2503.19786): norms before and after attention and MLP that multiply with
1 + weight, GeGLU, scaled embeddings, and a window with a rotary base of its own in five layers of six."""

from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.families.family import Family, Names, windows_by_layer

NAMES: dict[str, Names] = {
    "self_attention.linear_proj.post_layernorm.weight": ("post_attention_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("pre_feedforward_layernorm.weight",),
    "mlp.linear_fc2.post_layernorm.weight": ("post_feedforward_layernorm.weight",),
}
FEATURES = {
    "qk_norm": True,
    "norms": "both",
    "norm_plus_one": True,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
}


def _read(config: Any) -> dict[str, Any]:
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, key, None):
            raise ValueError(f"{key} is not supported")
    return {"attention_scale": config.query_pre_attn_scalar**-0.5}


def _write(arch: Architecture) -> dict[str, Any]:
    assert arch.attention_scale is not None
    return windows_by_layer(arch) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(arch.attention_scale**-2),
        "pad_token_id": None,
    }


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", FEATURES, NAMES, _read, _write, windows="layer_types")
