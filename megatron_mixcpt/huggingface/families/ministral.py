"""Ministral: Mistral with a window in some layers."""

from megatron_mixcpt.huggingface.families.family import Family, window_entries

FAMILY = Family("ministral", "MinistralForCausalLM", write=window_entries)
