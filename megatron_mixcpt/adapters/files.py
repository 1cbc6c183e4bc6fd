"""Adapters as directories of their own: PEFT's format for LoRA, `megatron_mixcpt.hf_alora`'s for ALoRA.

Both hold one set of matrices for each Hugging Face layer. Fused layers are taken apart without arithmetic, so values go
out and in bit for bit (layout.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_mixcpt import hf_alora
from megatron_mixcpt.adapters.layout import AdaptedLinear, adapted_linears
from megatron_mixcpt.adapters.peft_experts import peft_targets, separate_experts
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.huggingface.tensorfiles import SafetensorsWriter

FOLDER = "adapter"  # in a checkpoint
PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Ours against a Hugging Face layer's.
_PARTS = {
    "lora": {"down": "lora_A.weight", "up": "lora_B.weight"},
    "alora": {
        "down": "alora_A",
        "up": "alora_B",
        "attention_in": "alora_attention_in",
        "attention_out": "alora_attention_out",
    },
}
# What PEFT can do and we do not, with the values that ask for nothing.
_PEFT_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),  # IBM's Activated LoRA, not ours
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    # What else it can be changes the base model's weights (pissa, olora, corda, loftq, eva and others to come).
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}


def to_hf(linear: AdaptedLinear, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of each Hugging Face layer, of experts each one's, from the whole tensors of one linear layer's
    adapter, by file key."""
    parts = _PARTS[linear.config.method]
    result = {}
    for name in linear.tensors():
        for target, pieces in zip(linear.targets, _pieces(linear, name, tensors[linear.key(name)])):
            flat = [piece.reshape(-1, piece.shape[-1]) for piece in pieces]
            result[f"{target}.{parts[name]}"] = flat[0] if len(flat) == 1 else torch.cat(flat)
    return result


def _pieces(linear: AdaptedLinear, name: str, whole: Tensor) -> list[list[Tensor]]:
    """For each target the views of its parts of a whole tensor, several where its family fuses them.

    Of queries, keys and values they are `[groups, rows a group, r]`.
    """
    if linear.experts:
        return [views for of_one in whole for views in _pieces_of_one(linear, name, of_one)]
    return _pieces_of_one(linear, name, whole)


def _pieces_of_one(linear: AdaptedLinear, name: str, whole: Tensor) -> list[list[Tensor]]:
    """Of a layer, or of one expert's."""
    if name == "down":
        return [[view] for view in whole.chunk(linear.projections)]
    if name != "up":
        return [[view] for view in whole.unbind()]
    rows = [rows for rows, target in linear.rows if target is not None]
    views = whole.unbind() if linear.gated else whole.view(linear.groups, sum(rows), -1).split(rows, dim=1)
    owners = [target for _, target in linear.rows if target is not None]
    return [[view for view, owner in zip(views, owners) if owner == index] for index in range(linear.projections)]


def write_directory(
    out: Path,
    arch: Architecture,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    base: str | None,
) -> None:
    """Write an adapter into an existing directory.

    Args:
        tensors: whole ones, by the keys of checkpoints.
        base: directory or name of the base model; "base" for the folder of that name in `out`.
    """
    linears = adapted_linears(arch, config)
    pieces = {key: piece for linear in linears for key, piece in to_hf(linear, tensors).items()}
    settings: dict[str, Any]
    if config.method == "lora":
        _save(out / PEFT_WEIGHTS, {PEFT_PREFIX + key: piece for key, piece in pieces.items()})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            **peft_targets(arch, linears),
            "bias": "none",
            "inference_mode": True,
        }
        (out / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        return
    _save(out / hf_alora.WEIGHTS, pieces)
    settings = {
        "format": hf_alora.FORMAT,
        "base_model_name_or_path": base,
        "rank": config.rank,
        "alpha": config.alpha,
        "heads": config.num_heads,
        "residual": config.residual,
        "sliding_window": arch.sliding_window,
        "targets": [target for linear in linears for target in linear.targets],
    }
    (out / hf_alora.CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    with SafetensorsWriter(path.parent, shapes, dtype, path.stem, shard_bytes=sys.maxsize) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def check_directory(folder: Path, arch: Architecture, config: AdapterConfig) -> Path:
    """The weights' file of an adapter that `config` can go on from; reads its description alone.

    Raises ConfigError naming the key that differs, or the feature that is not supported.
    """
    where = f"adapter.init: {folder}"
    names = {"lora": (PEFT_CONFIG, PEFT_WEIGHTS), "alora": (hf_alora.CONFIG, hf_alora.WEIGHTS)}[config.method]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{where} has no {missing[0]}: it holds no adapter that adapter.method {config.method} reads")
    try:
        found = json.loads((folder / names[0]).read_text())
    except ValueError as error:
        raise ConfigError(f"{where}/{names[0]} is not JSON: {error}") from None
    if config.method == "lora":
        if found.get("peft_type") != "LORA":
            raise ConfigError(f"{where} is a PEFT adapter of type {found.get('peft_type')}, not LORA")
        for key, harmless in _PEFT_REFUSED.items():
            if key == "target_parameters" and arch.num_experts:
                continue  # a mixture's own layers; which they are, the tensors' names tell
            if found.get(key, harmless[0]) not in harmless:
                raise ConfigError(f"{where} sets {key}={found[key]!r}, which is not supported")
        pairs = [("rank", found["r"], config.rank), ("alpha", found["lora_alpha"], config.alpha)]
    else:
        same = ("rank", "alpha", "heads", "residual")
        pairs = [(key, found[key], config.num_heads if key == "heads" else getattr(config, key)) for key in same]
    for key, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(f"{where} has {key} {theirs}, adapter.{key} is {ours}: set adapter.{key}={theirs}")
    return folder / names[1]


def read_directory(folder: Path, arch: Architecture, config: AdapterConfig) -> dict[str, Tensor]:
    """Whole tensors by key, from a directory that PEFT or `write_directory` wrote.

    Raises ConfigError as `check_directory` and where other layers are adapted, VerificationError where tensors are
    damaged or of the wrong shape.
    """
    path = check_directory(folder, arch, config)
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path}: cannot be read: {error}") from None
    stored = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in stored.items()}
    linears = adapted_linears(arch, config)
    stored = separate_experts(path, stored, linears)
    _check_targets(folder, set(stored), linears)
    tensors = {}
    for linear in linears:
        parts = _PARTS[config.method]
        for name, (shape, _) in linear.tensors().items():
            whole = torch.empty(shape, dtype=torch.float32)
            for target, pieces in zip(linear.targets, _pieces(linear, name, whole)):
                source = stored[f"{target}.{parts[name]}"]
                width = pieces[0].shape[-1]
                rows = [piece.numel() // width for piece in pieces]
                expected = (sum(rows), width)
                if tuple(source.shape) != expected:
                    raise VerificationError(
                        f"{path}: {target}.{parts[name]} is {tuple(source.shape)}, this model takes {expected}"
                    )
                for piece, values in zip(pieces, source.split(rows)):
                    piece.copy_(values.view(piece.shape))
            tensors[linear.key(name)] = whole
    return tensors


def _check_targets(folder: Path, keys: set[str], linears: Iterable[AdaptedLinear]) -> None:
    expected = {
        f"{target}.{part}"
        for linear in linears
        for target in linear.targets
        for part in _PARTS[linear.config.method].values()
    }
    different = sorted(keys ^ expected)
    if different:
        which = "is adapted there" if different[0] in keys else "is not adapted there"
        raise ConfigError(
            f"adapter.init: {folder} adapts other layers than adapter.targets names: {different[0]} {which}: set "
            "adapter.targets to the same layers"
        )


def whole_delta(linear: AdaptedLinear, tensors: Mapping[str, Tensor]) -> Tensor:
    """LoRA: what the adapter adds to the whole weight of a linear layer, fp32 `[out, in]`, of experts one behind the
    other."""
    config, owners = linear.config, linear.row_targets()
    scale, ones = config.alpha / config.rank, max(linear.experts, 1)
    down = tensors[linear.key("down")].float().view(ones, linear.projections, config.rank, -1)
    up = tensors[linear.key("up")].float().view(ones, -1, config.rank)  # adapted rows in order
    delta = torch.zeros(ones, len(owners), linear.in_features)
    adapted = owners[owners >= 0]
    for index in range(linear.projections):
        delta[:, owners == index] = scale * (up[:, adapted == index] @ down[:, index])
    return delta if linear.experts else delta[0]
