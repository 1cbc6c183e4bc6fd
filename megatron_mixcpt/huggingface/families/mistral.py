"""Mistral (https://arxiv.org/abs/2310.06825): Llama with a sliding window."""

from megatron_mixcpt.huggingface.families.family import Family

FAMILY = Family(
    "mistral", "MistralForCausalLM", write=lambda arch: {"sliding_window": arch.sliding_window}, windows="every"
)
