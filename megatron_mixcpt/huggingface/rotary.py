"""Rotary positions as config.json describes them, in either generation of transformers <-> fields of Architecture."""

from __future__ import annotations

import math
from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture, RopeScaling

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def read_rotary(config: Any, head_dim: int) -> dict[str, Any]:
    """Fields of Architecture from a transformers configuration. Raises ValueError for what is not supported."""
    # transformers 5 keeps everything in rope_parameters, 4 in rope_theta, rope_scaling and attributes beside them.
    params = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    fields: dict[str, Any] = {}
    local = getattr(config, "rope_local_base_freq", None)
    if "full_attention" in params:  # by kind of layer
        windowed = params.get("sliding_attention") or {}
        if windowed.get("rope_type", "default") != "default":
            raise ValueError(f"rope type {windowed['rope_type']!r} of sliding_attention is not supported, only default")
        local = windowed.get("rope_theta")
        params = dict(params["full_attention"])
    if local is not None:
        fields["local_rope_theta"] = float(local)
    kind = params.get("rope_type", params.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; these are: {', '.join(KINDS)}")
    share = params.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
    if share != 1.0:
        fields["rotary_dim"] = int(head_dim * share)
    theta = params.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return fields | {"rope_theta": float(theta), "rope_scaling": _scaling(kind, params, config)}


def _scaling(kind: str, params: dict[str, Any], config: Any) -> RopeScaling | None:
    if kind == "default":
        return None
    names = ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    known: dict[str, Any] = {}
    if kind in ("yarn", "longrope"):
        names += ["beta_fast", "beta_slow", "truncate"]
        known["original_max_position_embeddings"] = (
            getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        )
    known |= {name: params[name] for name in names if params.get(name) is not None}
    factor = params.get("factor")
    if factor is None and kind == "longrope":
        factor = config.max_position_embeddings / known["original_max_position_embeddings"]
    if factor is None:
        raise ValueError(f"rope type {kind!r} without a factor is not supported")
    if kind == "longrope":
        known |= {name: tuple(map(float, params[name])) for name in ("short_factor", "long_factor")}
    if kind in ("yarn", "longrope"):
        original = known["original_max_position_embeddings"]
        known["attention_factor"] = _attention_factor(kind, float(factor), original, params)
    return RopeScaling(kind, float(factor), **known)


def _attention_factor(kind: str, factor: float, original: int, params: dict[str, Any]) -> float:
    """What queries and keys are multiplied with (YaRN, https://arxiv.org/abs/2309.00071, section 3.4; LongRoPE,
    https://arxiv.org/abs/2402.13753)."""
    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    mscale, of_all = params.get("mscale"), params.get("mscale_all_dim")
    return of(mscale) / of(of_all) if mscale and of_all else of(1.0)


def follows_from_contexts(scaling: RopeScaling, max_position_embeddings: int) -> bool:
    """Whether longrope's factors are what transformers takes where config.json names none."""
    original = scaling.original_max_position_embeddings
    factor = max_position_embeddings / original
    return (scaling.factor, scaling.attention_factor) == (factor, _attention_factor("longrope", factor, original, {}))


def rotary_entries(arch: Architecture) -> dict[str, Any]:
    """Entries of config.json; both generations of transformers find theirs."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    scaling = arch.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        names = {
            "linear": (),
            "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
            "longrope": ("original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
        }[scaling.kind]
        rope |= {name: getattr(scaling, name) for name in names}
    entries: dict[str, Any] = {"rope_theta": arch.rope_theta}
    if arch.rotary_dim is not None:
        rope["partial_rotary_factor"] = entries["partial_rotary_factor"] = arch.rotary_dim / arch.head_dim
    stretched = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    entries["rope_scaling"] = None if scaling is None else stretched
    if arch.local_rope_theta is None:
        return entries | {"rope_parameters": rope}
    windowed = {"rope_type": "default", "rope_theta": arch.local_rope_theta}
    entries["rope_local_base_freq"] = arch.local_rope_theta
    return entries | {"rope_parameters": {"full_attention": rope, "sliding_attention": windowed}}
