"""OLMo 3 (https://allenai.org/olmo): OLMo 2 with a window in three layers of four, which no rotary scaling touches."""

from typing import Any

from megatron_mixcpt.huggingface.families.family import Family, windows_by_layer
from megatron_mixcpt.huggingface.families.olmo2 import FEATURES, NAMES


def _read(config: Any) -> dict[str, Any]:
    if "full_attention" in (getattr(config, "rope_parameters", None) or {}):
        return {}
    return {"local_rope_theta": float(config.rope_theta)}  # transformers 4


FAMILY = Family("olmo3", "Olmo3ForCausalLM", FEATURES, NAMES, _read, windows_by_layer, windows="layer_types")
