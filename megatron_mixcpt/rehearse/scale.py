"""The small model and the short run that stand for the large ones."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import AdapterConfig, Config
from megatron_mixcpt.huggingface.config import config_dict
from megatron_mixcpt.huggingface.names import hf_shapes
from megatron_mixcpt.huggingface.tensorfiles import SafetensorsWriter
from megatron_mixcpt.rehearse.size import Grid

HEAD_DIM = 16
EXPERTS = 4  # at most; a token goes through half of them
STEPS = 4
MICRO_BATCH_SIZE = 2  # at most


def small_architecture(arch: Architecture, tensor: int, parts: int, seq_length: int) -> Architecture:
    """The same family in small: a layer for each of the pipeline's parts (at least two), heads that divide over
    `tensor` ranks as the model's own do, grouped queries and a few experts where it has them, its vocabulary, biases,
    norms and rotary scaling."""
    grouped = arch.num_attention_heads > arch.num_query_groups
    heads = 2 * tensor if grouped else tensor
    groups = min(arch.num_query_groups, tensor) if grouped else heads
    hidden = max(heads * HEAD_DIM, 64)
    if arch.model_type == "olmoe":
        hidden = heads * HEAD_DIM  # for which transformers takes it where it makes the norm of keys
    layers = max(parts, 2)
    rotary_dim = None if arch.rotary_dim is None else HEAD_DIM // 2
    scaling = arch.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        hidden = heads * HEAD_DIM  # Phi-3 has no head_dim of its own
        pairs = (rotary_dim or HEAD_DIM) // 2
        scaling = dataclasses.replace(
            scaling,
            short_factor=_spread(scaling.short_factor, pairs),
            long_factor=_spread(scaling.long_factor, pairs),
        )
    ffn = -(-2 * hidden // tensor) * tensor
    return dataclasses.replace(
        arch,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_experts=min(arch.num_experts, EXPERTS),
        experts_per_token=min(arch.experts_per_token, EXPERTS // 2),
        expert_ffn_size=ffn if arch.num_experts else 0,
        dense_layers=(0,) if arch.layers_differ else (),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=HEAD_DIM,
        sliding_window=min(arch.sliding_window, max(seq_length // 2, 1)) if arch.sliding_window else None,
        full_layers=(layers - 1,) if arch.full_layers else (),
        rotary_dim=rotary_dim,
        rope_scaling=scaling,
    )


def _spread(factors: tuple[float, ...], count: int) -> tuple[float, ...]:
    """`count` of them, evenly."""
    return tuple(factors[number * len(factors) // count] for number in range(count))


def write_random_model(arch: Architecture, folder: Path, dtype: torch.dtype, seed: int) -> None:
    """A Hugging Face directory of `arch` with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.zeros(shape) if arch.norm_plus_one else torch.ones(shape)
        return torch.randn(shape, generator=generator) * arch.initializer_range

    write_model(arch, folder, dtype, drawn)


def write_model(
    arch: Architecture, folder: Path, dtype: torch.dtype, weight: Callable[[str, tuple[int, ...]], torch.Tensor]
) -> None:
    """A Hugging Face directory of `arch`. `weight(name, shape)`: the tensor of a Hugging Face name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_dict(arch)))
    shapes = hf_shapes(arch)
    with SafetensorsWriter(folder, shapes, dtype) as writer:
        for name, shape in shapes.items():
            writer.write(name, weight(name, shape).to(dtype))


def small_run(
    config: Config, arch: Architecture, data_size: int, grid: Grid, model: Path, mix: Path, run_dir: Path
) -> dict[str, Any]:
    """Values of a configuration of STEPS steps with the settings of `config`, as far as they do not name sizes.

    Args:
        arch: of the real model.
        data_size: data-parallel size of the real run, which decides its number of micro-batches.
    """
    train = config.train
    micro_batch_size = min(train.micro_batch_size, MICRO_BATCH_SIZE)
    micro_batches = train.global_batch_size // (train.micro_batch_size * data_size)
    values = config.model_dump(by_alias=True)
    values["model"] = {"hf": str(model)}
    values["data"] |= {"mix": str(mix), "seq_length": None, "num_workers": min(config.data.num_workers, 1)}
    values["train"] |= {
        "steps": STEPS,
        "warmup_steps": min(train.warmup_steps, 1),
        "micro_batch_size": micro_batch_size,
        # At least as many as the pipeline has in flight, so that its schedule is the real one's.
        "global_batch_size": micro_batch_size * grid.data * min(micro_batches, 2 * grid.pipeline),
        "profile": None,
    }
    values["parallel"] |= {"layers_per_stage": None, "expert": expert_ranks(config, grid)}
    values["eval"] = {"every": 2, "max_samples": MICRO_BATCH_SIZE * grid.data}
    values["checkpoint"] |= {"every": 1, "keep": 2, "keep_every": 0}
    values["wandb"] = {"mode": "disabled"}
    values["run_dir"] = str(run_dir)
    if config.teacher.source in REPLACED_TEACHERS:
        values["teacher"] = {"source": "initial"}
    if config.forget is not None:
        values["forget"] |= {"every": STEPS // 2}
    if config.adapter is not None:
        values["adapter"] |= {"init": None, "targets": _small_targets(config.adapter, arch)}
    return values


def _small_targets(config: AdapterConfig, arch: Architecture) -> list[str]:
    """Patterns for a model of few layers and experts; where numbers of them are named, of the same kinds of layers."""
    if all("." not in pattern for pattern in config.targets):
        return list(config.targets)
    targets = (target for linear in adapted_linears(arch, config) for target in linear.targets)
    return sorted({re.sub(r"\.\d+\.", ".*.", target) for target in targets})


def expert_ranks(config: Config, grid: Grid) -> int:
    """Over how many of the ranks of `grid` the few experts of the small model are spread."""
    return math.gcd(config.parallel.expert, grid.context * grid.data, EXPERTS)


REPLACED_TEACHERS = ("cached", "deepspeed")
"""Which belong to the real model and its data."""
