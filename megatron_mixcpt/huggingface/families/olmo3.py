"""OLMo 3 (https://allenai.org/olmo): OLMo 2 with a window in three layers of four, which no rotary scaling touches."""

from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.families.family import Family, layer_types
from megatron_mixcpt.huggingface.families.olmo2 import FEATURES, NAMES


def _read(config: Any) -> dict[str, Any]:
    if "full_attention" in (getattr(config, "rope_parameters", None) or {}):
        return {}
    return {"local_rope_theta": float(config.rope_theta)}  # transformers 4


def _write(arch: Architecture) -> dict[str, Any]:
    return {"sliding_window": arch.sliding_window, "layer_types": layer_types(arch)}


FAMILY = Family("olmo3", "Olmo3ForCausalLM", FEATURES, NAMES, _read, _write)
