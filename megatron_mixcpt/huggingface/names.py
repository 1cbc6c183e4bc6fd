"""Hugging Face's tensors of the Llama family against megatron-core's whole tensors (see layout.py).

Llama, Mistral, Qwen2 and Qwen3 share these names; a family without biases or q/k norms simply lacks those rows.
"""

from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import EMBEDDING, OUTPUT, whole_shapes

# Derived from the configuration, stored by old checkpoints.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

_GLOBAL = {
    EMBEDDING: ["model.embed_tokens.weight"],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
    OUTPUT: ["lm_head.weight"],
}
_LAYER = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "self_attention.linear_qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}


def hf_names(name: str) -> list[str]:
    """The Hugging Face tensors that a whole tensor is made of, in order."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    _, _, layer, rest = name.split(".", 3)
    return [f"model.layers.{layer}.{part}" for part in _LAYER[rest]]


def places(name: str, whole: Tensor, arch: Architecture) -> list[Tensor]:
    """Where in the whole tensor `name` each of its Hugging Face tensors lies, as views in the order of `hf_names`.

    A view holds its tensor's numbers in order; of queries, keys and values it is `[groups, rows a group, ...]`.
    """
    if "linear_qkv" not in name:
        return list(whole.chunk(len(hf_names(name))))
    # Group by group: its queries, its key, its value.
    groups, d = arch.num_query_groups, arch.head_dim
    rows = whole.view(groups, -1, *whole.shape[1:])
    return list(rows.split([arch.num_attention_heads // groups * d, d, d], dim=1))


def split(name: str, whole: Tensor, arch: Architecture) -> list[Tensor]:
    """The Hugging Face tensors of the whole tensor `name`."""
    views = places(name, whole, arch)
    return [view.flatten(0, 1) for view in views] if "linear_qkv" in name else views


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor, in the order in which they are written."""
    q, kv = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in whole_shapes(arch).items():
        names = hf_names(name)
        rows = [q, kv, kv] if "linear_qkv" in name else [shape[0] // len(names)] * len(names)
        shapes.update({part: (n, *shape[1:]) for part, n in zip(names, rows)})
    return shapes
