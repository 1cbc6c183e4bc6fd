"""Ministral: Mistral with a window in some layers."""

from megatron_mixcpt.huggingface.families.family import Family, windows_by_layer

FAMILY = Family("ministral", "MinistralForCausalLM", write=windows_by_layer, windows="layer_types")
