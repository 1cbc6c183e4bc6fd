"""Dimensions of published models, to plan with before anything is downloaded (`mixcpt plan --model-shape`)."""

from __future__ import annotations

from megatron_mixcpt.architecture.architecture import Architecture


def _shape(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    vocabulary: int,
    positions: int,
    *,
    tied: bool = False,
    bias: bool = False,
) -> Architecture:
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        qkv_bias=bias,
    )


SHAPES: dict[str, Architecture] = {
    "smollm2-135m": _shape(30, 576, 1536, 9, 3, 49152, 8192, tied=True),
    "llama3-8b": _shape(32, 4096, 14336, 32, 8, 128256, 8192),
    "llama3.1-8b": _shape(32, 4096, 14336, 32, 8, 128256, 131072),
    "llama3-70b": _shape(80, 8192, 28672, 64, 8, 128256, 8192),
    "qwen2-7b": _shape(28, 3584, 18944, 28, 4, 152064, 131072, bias=True),
    "gemma-3-4b-text": Architecture(
        num_layers=34,
        hidden_size=2560,
        ffn_hidden_size=10240,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=256,
        vocab_size=262208,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        qk_norm=True,
        sliding_window=1024,
        full_layers=(5, 11, 17, 23, 29),
        local_rope_theta=10000.0,
        norms="both",
        norm_plus_one=True,
        activation="gelu_tanh",
        attention_scale=256**-0.5,
        scale_embeddings=True,
    ),
    "qwen3-30b-a3b": Architecture(
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        model_type="qwen3_moe",
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_size=768,
        normalize_routing=True,
    ),
}
