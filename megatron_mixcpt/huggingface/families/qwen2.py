"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2412.15115): a bias on queries, keys and values."""

from megatron_mixcpt.huggingface.families.family import Family, qwen_windows

FAMILY = Family("qwen2", "Qwen2ForCausalLM", features={"qkv_bias": True}, write=qwen_windows, windows="layer_types")
