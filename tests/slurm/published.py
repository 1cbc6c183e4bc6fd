"""config.json of published models: their dimensions, as anybody can read them on the Hugging Face Hub."""


def _config(family, *, hidden, ffn, layers, heads, groups, vocabulary, positions, eps=1e-5, theta, tied=False, **more):
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        **more,
    }


LLAMA3 = {"groups": 8, "vocabulary": 128256, "positions": 8192, "theta": 500000.0}
CONFIGS = {
    "SmolLM2-135M": _config(
        "llama", hidden=576, ffn=1536, layers=30, heads=9, groups=3, vocabulary=49152, positions=8192,
        theta=100000, tied=True,
    ),
    "Meta-Llama-3-8B": _config("llama", hidden=4096, ffn=14336, layers=32, heads=32, **LLAMA3),
    "Meta-Llama-3.1-8B": _config(
        "llama", hidden=4096, ffn=14336, layers=32, heads=32, **LLAMA3 | {"positions": 131072},
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Meta-Llama-3-70B": _config("llama", hidden=8192, ffn=28672, layers=80, heads=64, **LLAMA3),
    "Qwen2-7B": _config(
        "qwen2", hidden=3584, ffn=18944, layers=28, heads=28, groups=4, vocabulary=152064, positions=131072,
        eps=1e-6, theta=1000000.0, sliding_window=131072, use_sliding_window=False,
    ),
    "gemma-3-4b-text": _config(
        "gemma3_text", hidden=2560, ffn=10240, layers=34, heads=8, groups=4, vocabulary=262208, positions=131072,
        eps=1e-6, theta=1000000.0, tied=True, architectures=["Gemma3ForCausalLM"], head_dim=256,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=1024, sliding_window_pattern=6,
        rope_local_base_freq=10000.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "Qwen3-30B-A3B": _config(
        "qwen3_moe", hidden=2048, ffn=6144, layers=48, heads=32, groups=4, vocabulary=151936, positions=40960,
        eps=1e-6, theta=1000000.0, architectures=["Qwen3MoeForCausalLM"], head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], sliding_window=None, use_sliding_window=False,
    ),
}  # fmt: skip
PARAMETERS = {
    "SmolLM2-135M": 134.5,
    "Meta-Llama-3-8B": 8030.3,
    "Meta-Llama-3.1-8B": 8030.3,
    "Meta-Llama-3-70B": 70553.7,
    "Qwen2-7B": 7615.6,
    "gemma-3-4b-text": 3880.3,
    "Qwen3-30B-A3B": 30532.1,
}
"""In millions, as their model cards say (tied embeddings counted once)."""
