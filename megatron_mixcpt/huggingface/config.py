"""Hugging Face config.json <-> Architecture, saying what is not supported before anything is read."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.families import FAMILIES
from megatron_mixcpt.huggingface.families.family import Family
from megatron_mixcpt.huggingface.gguf import gguf_file, gguf_option, unread_rotation
from megatron_mixcpt.huggingface.rotary import read_rotary, rotary_entries

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours, theirs
REFUSED_KEYS = {
    "attention_bias": "a bias on the output projection",
    "mlp_bias": "a bias on the MLP's projections",
    "n_shared_experts": "experts that every token goes through",
    "shared_expert_intermediate_size": "experts that every token goes through",
}
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def check_directory(hf_dir: str | Path) -> None:
    """Raise ConfigError where there is no model to read; needs no library."""
    path = Path(hf_dir)
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory: give the path of a downloaded Hugging Face model")
    if gguf_file(path) is None and not (path / "config.json").exists():
        raise ConfigError(f"{path} has no config.json: it is not a Hugging Face model directory")


def load_config(hf_dir: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a local model directory.

    Raises:
        ConfigError: no such directory, no configuration in it, or transformers cannot read it.
    """
    check_directory(hf_dir)
    from transformers import AutoConfig  # takes seconds

    path = Path(hf_dir)
    try:
        return AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code, **gguf_option(path)
        )
    except Exception as error:  # transformers raises many kinds for a bad file
        raise ConfigError(f"{path}: transformers cannot read its configuration: {error}") from error


def architecture_from_hf(hf_dir: str | Path, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a local Hugging Face model directory (config.json, or a single GGUF file).

    Raises:
        ConfigError: there is none, or it is of a family or uses a feature that is not implemented.
    """
    check_directory(hf_dir)
    path = Path(hf_dir) / "config.json"
    if path.exists():
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path}: cannot read it: {error}") from error
        if isinstance(values, dict) and "model_type" in values and not trust_remote_code:
            # Before transformers, which may not know it; code that is trusted may say another.
            _check_family(values["model_type"], str(hf_dir))
    arch = architecture_from_config(load_config(hf_dir, trust_remote_code), str(hf_dir))
    if not path.exists():
        _check_gguf(hf_dir, arch)
    return arch


def architecture_from_config(config: Any, where: str) -> Architecture:
    """`config`: a transformers configuration; `where` names it in errors.

    Raises:
        ConfigError: the model is of a family, or uses a feature, that is not implemented.
    """

    def refuse(what: str) -> NoReturn:
        raise ConfigError(f"{where}: {what}")

    _check_family(config.model_type, where)
    family = FAMILIES[config.model_type]
    if getattr(config, "quantization_config", None):
        refuse("its weights are quantised; training needs the original 16- or 32-bit weights")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    expected = ACTIVATIONS[family.features.get("activation", "silu")]
    if activation != expected:
        refuse(f"hidden_act {activation!r} is not supported, only {expected}")
    for key, meaning in REFUSED_KEYS.items():
        if getattr(config, key, False):
            refuse(f"{key} is not supported ({meaning})")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    try:
        own = read_rotary(config, head_dim) | _windows(config, family) | family.read(config)
    except ValueError as error:
        refuse(str(error))
    if "rotary_dim" in own and not family.partial_rotary:
        refuse("partial_rotary_factor is not supported (rotary positions on part of a head)")
    experts = [key for key in EXPERT_KEYS if getattr(config, key, None)]
    if experts and "num_experts" not in own:
        refuse(f"model_type {config.model_type!r} with experts ({experts[0]}) is not supported")
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads or heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        initializer_range=config.initializer_range,
        **family.features,
        **own,
    )


def _check_gguf(hf_dir: str | Path, arch: Architecture) -> None:
    """Raise ConfigError where transformers would make another model of a GGUF file than it is."""
    unread = unread_rotation(hf_dir, arch.num_rotary_channels) if arch.rope_scaling is None else None
    if arch.num_experts:
        unread = "experts"
    if unread:
        raise ConfigError(
            f"{hf_dir}: {unread} of a GGUF file is not read by transformers, which would make another model of it: "
            "take the model's safetensors"
        )


def _check_family(model_type: Any, where: str) -> None:
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is not supported; these are: {', '.join(sorted(FAMILIES))}"
        )


def _windows(config: Any, family: Family) -> dict[str, Any]:
    types = getattr(config, "layer_types", None) or ()
    others = sorted(set(types) - {"full_attention", "sliding_attention"})
    if others:
        raise ValueError(f"layers of {', '.join(others)} are not supported")
    window = getattr(config, "sliding_window", None)
    if family.windows == "none" or window is None:
        return {}
    full = tuple(n for n, kind in enumerate(types) if family.windows == "layer_types" and kind == "full_attention")
    return {} if len(full) == config.num_hidden_layers else {"sliding_window": int(window), "full_layers": full}


def config_dict(arch: Architecture) -> dict[str, Any]:
    """config.json of an architecture that came from no Hugging Face directory (a preset)."""
    family = FAMILIES[arch.model_type]
    defaults = {field.name: field.default for field in fields(Architecture)}
    features = {key: defaults[key] for other in FAMILIES.values() for key in other.features} | dict(family.features)
    differing = [f"{key}={getattr(arch, key)}" for key, value in features.items() if getattr(arch, key) != value]
    unlike = {"none": True, "every": bool(arch.full_layers), "layer_types": False}[family.windows]
    if arch.sliding_window is not None and unlike:
        differing.append(f"sliding_window={arch.sliding_window}, full_layers={arch.full_layers}")
    if differing:
        raise ValueError(f"model_type {arch.model_type!r} does not have {', '.join(differing)}")
    return {
        "architectures": [family.model_class],
        "model_type": arch.model_type,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "initializer_range": arch.initializer_range,
        "hidden_act": ACTIVATIONS[arch.activation],
        **rotary_entries(arch),
        **family.write(arch),
    }
