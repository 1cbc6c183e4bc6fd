"""Llama (https://arxiv.org/abs/2407.21783), and the many models that share its architecture."""

from megatron_mixcpt.huggingface.families.family import Family

FAMILY = Family("llama", "LlamaForCausalLM")
