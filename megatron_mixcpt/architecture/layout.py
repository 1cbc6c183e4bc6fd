"""How a whole tensor becomes this rank's shard: the one place that knows megatron-core's weight layouts.

Whole tensors have megatron-core's shapes over a single rank, with the true (unpadded) vocabulary:
`linear_qkv` interleaves queries, key and value group by group, `linear_fc1` is the gate above the up projection. The
linear layers of a layer's experts are one tensor each, `[experts, ...]`: expert ranks have some of the experts each, of
which tensor ranks have a part each.
`post_layernorm` of a layer's last linear is the norm of what comes out of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_mixcpt.architecture.architecture import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Slot:
    """One parameter of this rank's stage. `name` numbers layers over the whole model, so it is the same on any grid."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]  # of the whole tensor


@dataclass(frozen=True)
class Place:
    """A rank among those that share whole tensors: `tensor` of `tensors`, and where experts are spread over ranks
    (`parallel.expert`) `expert` of `experts`."""

    tensor: int = 0
    tensors: int = 1
    expert: int = 0
    experts: int = 1


def whole_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every whole parameter tensor by name; with tied embeddings the output layer has none of its own."""
    h, q, kv = arch.hidden_size, arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (arch.vocab_size, h)}
    for layer in range(arch.num_layers):
        prefix = f"decoder.layers.{layer}."
        if arch.norms != "after":
            shapes[prefix + "input_layernorm.weight"] = (h,)
        shapes[prefix + "self_attention.linear_qkv.weight"] = (q + 2 * kv, h)
        if arch.qkv_bias:
            shapes[prefix + "self_attention.linear_qkv.bias"] = (q + 2 * kv,)
        if arch.qk_norm:
            shapes[prefix + "self_attention.q_layernorm.weight"] = (arch.head_dim,)
            shapes[prefix + "self_attention.k_layernorm.weight"] = (arch.head_dim,)
        if arch.qk_norm_whole:
            shapes[prefix + "self_attention.q_layernorm.weight_of_heads"] = (q,)
            shapes[prefix + "self_attention.k_layernorm.weight_of_heads"] = (kv,)
        shapes[prefix + "self_attention.linear_proj.weight"] = (h, q)
        if arch.norms != "before":
            shapes[prefix + "self_attention.linear_proj.post_layernorm.weight"] = (h,)
        if arch.norms != "after":
            shapes[prefix + "pre_mlp_layernorm.weight"] = (h,)
        if arch.has_experts(layer):
            experts, ffn = arch.num_experts, arch.expert_ffn_size
            shapes[prefix + "mlp.router.weight"] = (experts, h)
            shapes[prefix + "mlp.experts.linear_fc1.weight"] = (experts, 2 * ffn, h)
            shapes[prefix + "mlp.experts.linear_fc2.weight"] = (experts, h, ffn)
            continue
        shapes[prefix + "mlp.linear_fc1.weight"] = (2 * arch.ffn_hidden_size, h)
        shapes[prefix + "mlp.linear_fc2.weight"] = (h, arch.ffn_hidden_size)
        if arch.norms != "before":
            shapes[prefix + "mlp.linear_fc2.post_layernorm.weight"] = (h,)
    shapes["decoder.final_layernorm.weight"] = (h,)
    if not arch.tie_word_embeddings:
        shapes[OUTPUT] = (arch.vocab_size, h)
    return shapes


def slots(model: nn.Module, arch: Architecture, first_layer: int) -> list[Slot]:
    """This rank's weights with their names over the whole model. `first_layer`: layers on earlier stages."""
    shapes = whole_shapes(arch)
    result = []
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            continue
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first_layer)
        name = ".".join(parts)
        if name == OUTPUT and arch.tie_word_embeddings:
            name = EMBEDDING  # the last stage's own copy
        result.append(Slot(name, parameter, shapes[name]))
    return result


def is_whole(name: str) -> bool:
    """Whether every tensor rank has all of it: routers, and norms, but those of all heads together."""
    return ("layernorm" in name and not name.endswith("weight_of_heads")) or name.endswith("router.weight")


def is_of_experts(name: str) -> bool:
    """Whether expert ranks have some rows each."""
    return ".experts." in name


def shard(name: str, whole: Tensor, place: Place, padded_vocab: int) -> Tensor:
    """A rank's part of a whole tensor (a view where possible); vocabulary padding rows are zero."""
    if name in (EMBEDDING, OUTPUT):
        rows = padded_vocab // place.tensors
        part = whole[place.tensor * rows : (place.tensor + 1) * rows]
        if len(part) == rows:
            return part
        return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
    if is_whole(name):
        return whole
    if is_of_experts(name):
        whole = whole.chunk(place.experts)[place.expert]
    if "linear_fc1" in name:
        gate, up = (half.chunk(place.tensors, dim=-2)[place.tensor] for half in whole.chunk(2, dim=-2))
        return torch.cat([gate, up], dim=-2)
    return whole.chunk(place.tensors, dim=_axis(name))[place.tensor]


def _axis(name: str) -> int:
    return -1 if "linear_proj" in name or "linear_fc2" in name else 0


def unshard(name: str, parts: list[Tensor], vocab_size: int, experts: int = 1) -> Tensor:
    """The whole tensor from all tensor ranks' parts: the inverse of `shard`.

    Args:
        parts: in order; of experts that are spread over `experts` ranks, those of each after those of the one before.
    """
    if is_of_experts(name) and experts > 1:
        tensors = len(parts) // experts
        of_each = [parts[first : first + tensors] for first in range(0, len(parts), tensors)]
        return torch.cat([unshard(name, of, vocab_size) for of in of_each])
    if name in (EMBEDDING, OUTPUT):
        return torch.cat(parts)[:vocab_size]
    if is_whole(name):
        return parts[0]
    if "linear_fc1" in name:
        halves = [part.chunk(2, dim=-2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], dim=-2)
    return torch.cat(parts, dim=_axis(name))
