"""Hugging Face config.json <-> Architecture, saying what is not supported before anything is read."""

from pathlib import Path
from typing import Any, NoReturn

from megatron_mixcpt.architecture.architecture import Architecture, RopeScaling
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.families import FAMILIES

ROPE_TYPES = ("default", "linear", "llama3")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def gguf_file(hf_dir: Path) -> Path | None:
    """The GGUF file of a directory that has one and no config.json."""
    files = sorted(hf_dir.glob("*.gguf"))
    if (hf_dir / "config.json").exists() or not files:
        return None
    if len(files) > 1:
        raise ConfigError(f"{hf_dir} holds {len(files)} GGUF files: leave the one to use in a directory of its own")
    return files[0]


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
    gguf = gguf_file(path)
    extra = {"gguf_file": gguf.name} if gguf else {}
    try:
        return AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code, **extra
        )
    except Exception as error:  # transformers raises many kinds for a bad file
        raise ConfigError(f"{path}: transformers cannot read its configuration: {error}") from error


def architecture_from_hf(hf_dir: str | Path, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a local Hugging Face model directory (config.json, or a single GGUF file).

    Raises:
        ConfigError: there is none, or it is of a family or uses a feature that is not implemented.
    """
    return architecture_from_config(load_config(hf_dir, trust_remote_code), str(hf_dir))


def architecture_from_config(config: Any, where: str) -> Architecture:
    """`config`: a transformers configuration; `where` names it in errors.

    Raises:
        ConfigError: the model is of a family, or uses a feature, that is not implemented.
    """

    def refuse(what: str) -> NoReturn:
        raise ConfigError(f"{where}: {what}")

    experts = [key for key in EXPERT_KEYS if getattr(config, key, None)]
    if experts:
        refuse(f"this is a mixture-of-experts model ({experts[0]}), which is not supported; use a dense model")
    if config.model_type not in FAMILIES:
        refuse(f"model_type {config.model_type!r} is not supported; these are: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[config.model_type]
    if getattr(config, "quantization_config", None):
        refuse("its weights are quantised; training needs the original 16- or 32-bit weights")
    if config.hidden_act != "silu":
        refuse(f"hidden_act {config.hidden_act!r} is not supported, only silu")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            refuse(f"{key} is not supported (a bias on the output or MLP projections)")
    try:
        own = family.read(config)
    except ValueError as error:
        refuse(str(error))
    heads = config.num_attention_heads
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        initializer_range=config.initializer_range,
        sliding_window=_sliding_window(config, where),
        **_rope(config, where),
        **family.features,
        **own,
    )


def _sliding_window(config: Any, where: str) -> int | None:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ConfigError(f"{where}: layers of different attention ({', '.join(sorted(kinds))}) are not supported")
    return int(window)


def _rope(config: Any, where: str) -> dict[str, Any]:
    # transformers 5 keeps everything in rope_parameters, 4 in rope_theta and rope_scaling.
    params = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    theta = params.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    kind = params.get("rope_type", params.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; these are: {', '.join(ROPE_TYPES)}")
    if params.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is not supported (rotary positions on part of a head)")
    scaling = None
    if kind != "default":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = RopeScaling(kind, float(params["factor"]), **{n: params[n] for n in names if n in params})
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def config_dict(arch: Architecture) -> dict[str, Any]:
    """config.json of an architecture that came from no Hugging Face directory (a preset)."""
    family = FAMILIES[arch.model_type]
    features = {"qkv_bias": False, "qk_norm": False, **family.features}
    differing = [f"{key}={getattr(arch, key)}" for key, value in features.items() if getattr(arch, key) != value]
    if differing:
        raise ValueError(f"model_type {arch.model_type!r} does not have {', '.join(differing)}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if arch.rope_scaling is not None:
        rope |= {"rope_type": arch.rope_scaling.kind, "factor": arch.rope_scaling.factor}
        if arch.rope_scaling.kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                rope[name] = getattr(arch.rope_scaling, name)
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
        "hidden_act": "silu",
        # Both generations of transformers find theirs.
        "rope_parameters": rope,
        "rope_theta": arch.rope_theta,
        "rope_scaling": None if arch.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        **family.write(arch),
    }
