"""OLMo 2 (https://arxiv.org/abs/2501.00656): norms after attention and MLP, and over all queries and keys together."""

from megatron_mixcpt.huggingface.families.family import Family, Names

NAMES: dict[str, Names] = {
    "self_attention.linear_proj.post_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc2.post_layernorm.weight": ("post_feedforward_layernorm.weight",),
    "self_attention.q_layernorm.weight_of_heads": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight_of_heads": ("self_attn.k_norm.weight",),
}
FEATURES = {"qk_norm_whole": True, "norms": "after"}
FAMILY = Family("olmo2", "Olmo2ForCausalLM", FEATURES, NAMES)
