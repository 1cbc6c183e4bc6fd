"""Hugging Face's tensors against megatron-core's whole tensors (see layout.py), as the model's family names them."""

import math
from itertools import groupby

import torch
from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import EMBEDDING, OUTPUT, whole_shapes
from megatron_mixcpt.huggingface.families import FAMILIES

# Derived from the configuration, stored by old checkpoints.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

_GLOBAL = {
    EMBEDDING: ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    OUTPUT: ("lm_head.weight",),
}


def part_names(name: str, arch: Architecture) -> tuple[str, ...]:
    """The Hugging Face tensor that holds each part of a whole tensor (queries, keys, values; gate, up, of each expert),
    in order.

    Where a family fuses parts, the same tensor follows itself.
    """
    if name in _GLOBAL:
        return _GLOBAL[name]
    family, (_, _, layer, rest) = FAMILIES[arch.model_type], name.split(".", 3)
    return tuple(f"model.layers.{layer}.{part}" for part in family.layer_names(rest, arch.num_experts))


def hf_names(name: str, arch: Architecture) -> list[str]:
    """The Hugging Face tensors that a whole tensor is made of, in order."""
    return list(dict.fromkeys(part_names(name, arch)))


def places(name: str, whole: Tensor, arch: Architecture) -> list[list[Tensor]]:
    """Where in the whole tensor `name` each of its Hugging Face tensors lies, in the order of `hf_names`: views that
    hold its numbers one after the other.

    A view of queries, keys or values is `[groups, rows a group, ...]`.
    """
    names = part_names(name, arch)
    if "linear_qkv" in name:
        # Group by group: its queries, its key, its value.
        groups, d = arch.num_query_groups, arch.head_dim
        rows = whole.view(groups, -1, *whole.shape[1:])
        views = rows.split([arch.num_attention_heads // groups * d, d, d], dim=1)
    elif len(set(names)) == 1:
        return [[whole]]
    else:
        views = (whole.flatten(0, 1) if whole.dim() == 3 else whole).chunk(len(names))  # experts one above the other
    return [[view for _, view in parts] for _, parts in groupby(zip(names, views), key=lambda part: part[0])]


def split(name: str, whole: Tensor, arch: Architecture) -> list[Tensor]:
    """The Hugging Face tensors of the whole tensor `name`; views of it where they lie in one piece."""
    result = []
    for views in places(name, whole, arch):
        if "linear_qkv" in name:
            views = [view.flatten(0, 1) for view in views]
        result.append(views[0] if len(views) == 1 else torch.cat(views))
    return result


def part_rows(name: str, rows: int, arch: Architecture) -> list[tuple[str, int]]:
    """Of each part of a whole tensor of `rows` rows, in order: the Hugging Face tensor that holds it, and its rows."""
    names = part_names(name, arch)
    counts = [rows // len(names)] * len(names)
    if "linear_qkv" in name:
        q, kv = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
        counts = [q, kv, kv]
    return list(zip(names, counts))


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor, in the order in which they are written."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in whole_shapes(arch).items():
        rows_of_all = math.prod(shape[:-1]) if len(shape) == 3 else shape[0]
        for part, parts in groupby(part_rows(name, rows_of_all, arch), key=lambda part: part[0]):
            shapes[part] = (sum(rows for _, rows in parts), *shape[len(shape) - 1 or 1 :])
    return shapes
