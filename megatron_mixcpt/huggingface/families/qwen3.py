"""Qwen3 (https://arxiv.org/abs/2505.09388): queries and keys are normalised, head by head."""

from megatron_mixcpt.huggingface.families.family import Family, qwen_windows

FAMILY = Family("qwen3", "Qwen3ForCausalLM", features={"qk_norm": True}, write=qwen_windows, windows="layer_types")
