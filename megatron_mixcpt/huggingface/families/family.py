"""What one family of models is: from it follow conversion both ways, the network, adapters and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_mixcpt.architecture.architecture import Architecture

Names = tuple[str, ...]

# The Hugging Face tensors that each whole tensor of a layer (architecture/layout.py) is made of, in order: Llama's,
# and of experts those that most families have.
# A name that stands several times is one tensor that holds them all, one above the other.
LLAMA_NAMES: dict[str, Names] = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.experts.linear_fc1.weight": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp.experts.linear_fc2.weight": ("mlp.experts.{}.down_proj.weight",),
}


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def windows_by_layer(arch: Architecture) -> dict[str, Any]:
    """Entries of config.json that say which layers have a window."""
    types = ["full_attention" if arch.window(n) is None else "sliding_attention" for n in range(arch.num_layers)]
    return {"sliding_window": arch.sliding_window, "layer_types": types}


def qwen_windows(arch: Architecture) -> dict[str, Any]:
    """The same of Qwen2 and Qwen3."""
    if arch.sliding_window is None:
        return {"use_sliding_window": False}
    return windows_by_layer(arch) | {"use_sliding_window": True, "max_window_layers": len(arch.full_layers)}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: as config.json calls it.
        model_class: transformers' class, which config.json names too.
        features: fields of Architecture that all models of the family have alike.
        names: where they differ from LLAMA_NAMES. Of experts, one after the other: `{}` is the number of each.
        read: further fields of Architecture, from a transformers configuration. Raises ValueError, which says what is
            not supported.
        write: further entries of config.json, from an architecture.
        windows: which layers have the `sliding_window` of config.json, as transformers' class reads it: none (whatever
            the file says), every, or those that `layer_types` names.
        partial_rotary: whether rotary positions may be those of a part of each head.
    """

    model_type: str
    model_class: str
    features: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, Names] = field(default_factory=dict)
    read: Callable[[Any], dict[str, Any]] = _nothing
    write: Callable[[Architecture], dict[str, Any]] = _nothing
    windows: Literal["none", "every", "layer_types"] = "none"
    partial_rotary: bool = False

    def layer_names(self, rest: str, num_experts: int) -> Names:
        """Of the whole tensor `decoder.layers.N.<rest>`, without `model.layers.N.`."""
        names = self.names[rest] if rest in self.names else LLAMA_NAMES[rest]
        if ".experts." in rest:
            return tuple(name.format(expert) for expert in range(num_experts) for name in names)
        return names
