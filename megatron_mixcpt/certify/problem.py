"""What is computed twice: a small model of the same family, the rows it sees, and the settings of the run.

The weights in training are not those it started from, so that teacher and student differ as they do in a run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_mixcpt.adapters.layout import linear_layers
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.init import named_generator
from megatron_mixcpt.certify.routes import Weight, clearly_routed, router_names
from megatron_mixcpt.certify.sample import write_sample
from megatron_mixcpt.certify.scope import left_out, small_parts, small_stages
from megatron_mixcpt.config import AdapterConfig, Config
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.huggingface.names import hf_shapes
from megatron_mixcpt.rehearse.scale import small_architecture, small_run, write_model
from megatron_mixcpt.rehearse.size import Grid

SEQ_LENGTH = 48  # at least
STEPS = 2  # that are compared
LEARNING_RATE = 2e-3  # large enough to be seen in bf16 weights
SPREAD, MOVED = 0.15, 0.05  # of random weights; of what training has changed
ADDED = 0.2  # by an adapter, compared with its input
HEAD_NORM = 2.5  # of the final norm: peaked distributions
TIED_ROWS = 4  # every so-many-th row of the head's first half is that of the second half too

START, STUDENT = "start", "student"  # folders of a problem


@dataclass(frozen=True)
class Problem:
    """The files of both sides, and the configuration of the small run.

    Attributes:
        values: of the configuration; its adapter, if any, starts from `folder/adapter-start`.
        grid: ranks of the small run.
        seq_length: tokens of a stored sequence.
        left_out: settings of the run that take no part.
    """

    folder: Path
    values: dict[str, Any]
    arch: Architecture
    grid: Grid
    seq_length: int
    left_out: tuple[str, ...]

    @property
    def mix(self) -> Path:
        """Its mix.json."""
        return Path(self.values["data"]["mix"])

    def model(self, which: str) -> Path:
        """Hugging Face directory of the weights of `which`, START or STUDENT."""
        return self.folder / which

    def adapter(self, which: str) -> Path:
        """Directory of the adapter of `which`."""
        return self.folder / f"adapter-{which}"


def pose(config: Config, arch: Architecture, mix: Mix, grid: Grid, data_size: int, folder: Path) -> Problem:
    """Write the problem of a configuration into `folder`.

    Args:
        arch, mix: of the real run.
        grid: of the small run, of which `data_size` is the real data-parallel size.
    """
    layout = config.parallel
    step = 4 * layout.context * layout.tensor  # rows cut into parts, of several pieces each
    seq_length = math.ceil(SEQ_LENGTH / step) * step
    values = small_run(config, arch, data_size, grid, folder / START, folder / "data" / "mix.json", folder / "run")
    rows = 2 * STEPS * values["train"]["global_batch_size"]
    sources = _of_kind(mix, config)
    sample = write_sample(sources, arch, layout.tensor, seq_length, rows, folder / "data")
    small = dataclasses.replace(
        small_architecture(arch, layout.tensor, small_parts(config), seq_length),
        vocab_size=read_mix(sample).tokenizer.vocab_size,
        max_position_embeddings=max(arch.max_position_embeddings, 2 * seq_length),
        sliding_window=min(arch.sliding_window, seq_length // 6) if arch.sliding_window else None,
    )
    seed, kept = config.train.seed, router_names(small) if config.train.router == "frozen" else set()
    start = _drawn(small, seed)
    for which, weight in ((START, start), (STUDENT, _moved(start, seed, kept))):
        weight = clearly_routed(weight, small, seed) if small.num_experts else weight
        write_model(small, folder / which, torch.bfloat16, weight)
    values |= {"forget": config.model_dump()["forget"], "eval": {"every": 0}}
    values["teacher"] = _teacher(config, folder)
    values["parallel"] |= {"layers_per_stage": small_stages(config)}
    values["data"] |= {"weights": {}}  # which are the sample's own
    factor = LEARNING_RATE / config.train.lr
    values["train"] |= {"lr": LEARNING_RATE, "min_lr": factor * config.train.min_lr}
    problem = Problem(folder, values, small, grid, seq_length, left_out(config, arch))
    if config.adapter is not None:
        # A cache names the base model's weights alone, and is no teacher of a run that begins with an adapter.
        begins = None if values["teacher"]["source"] == "cached" else str(problem.adapter(START))
        values["adapter"] |= {"init": begins, "dropout": 0.0}
        adapter = AdapterConfig.model_validate(values["adapter"])
        for which, seed in ((START, 1), (STUDENT, 2)):
            write_adapter(problem.adapter(which), small, adapter, config.train.seed + seed)
    return problem


def _teacher(config: Config, folder: Path) -> dict[str, Any]:
    """The run's teacher; the model that training starts from in place of another."""
    values = config.model_dump()["teacher"]
    if config.teacher.hf is not None:
        values["hf"] = str(folder / START)
    if config.teacher.offload == "nvme":
        values |= {"offload": "cpu", "nvme_path": None}
    return values


def _of_kind(mix: Mix, config: Config) -> Mix:
    """The sources that the run trains on, with their shares, without what its kind of training does not read."""
    pairs, weights = config.kind == "dpo", config.data.weights
    sources = [
        dataclasses.replace(source, weight=weights.get(source.name, source.weight))
        for source in mix.sources
        if (source.pairs[0] if pairs else source.train)
    ]
    kept = [source for source in sources if source.weight > 0]
    if not pairs:
        kept = [dataclasses.replace(source, pairs=(None, None)) for source in kept]
    return dataclasses.replace(mix, sources=tuple(kept))


def _drawn(arch: Architecture, seed: int) -> Weight:
    """Weights that leave nothing out: no norm of ones, no bias of zeros, tokens of the head that are always tied."""

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        value = torch.randn(shape, generator=named_generator(name, seed))
        if name.endswith("norm.weight"):
            return (HEAD_NORM if name == "model.norm.weight" else 1.0) + 2 * SPREAD * value
        value *= SPREAD
        if name == ("model.embed_tokens.weight" if arch.tie_word_embeddings else "lm_head.weight"):
            half = shape[0] // 2
            value[half : 2 * half : TIED_ROWS] = value[0:half:TIED_ROWS]
        return value

    return weight


def _moved(start: Weight, seed: int, kept: Collection[str]) -> Weight:
    """`kept`: names of what is not trained."""

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        value = start(name, shape)
        if name in kept:
            return value
        return value + MOVED * torch.randn(shape, generator=named_generator(f"{name} moved", seed))

    return weight


def write_adapter(folder: Path, arch: Architecture, config: AdapterConfig, seed: int) -> None:
    """An adapter that adds something everywhere, in the format that `adapter.init` names."""
    folder.mkdir()
    shapes = hf_shapes(arch)
    targets = [name for name in linear_layers(arch) if any(_matches(name, pattern) for pattern in config.targets)]
    tensors = {}
    for target in targets:
        rows, width = shapes[f"{target}.weight"]
        for part, shape in adapter_shapes(config, rows, width).items():
            key = f"{target}.{part}"
            spread = 1.0 / math.sqrt(shape[-1])
            if "_B" in part:
                spread *= ADDED * config.rank / config.alpha
            value = spread * torch.randn(shape, generator=named_generator(key, seed))
            tensors[f"base_model.model.{key}" if config.method == "lora" else key] = value.to(torch.bfloat16).float()
    if config.method == "lora":
        save_file(tensors, folder / "adapter_model.safetensors")
        settings: dict[str, Any] = {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return
    save_file(tensors, folder / "alora.safetensors")
    settings = {"format": "mixcpt-alora/1", "rank": config.rank, "alpha": config.alpha, "heads": config.num_heads}
    settings |= {"residual": config.residual, "sliding_window": arch.sliding_window, "targets": targets}
    (folder / "alora_config.json").write_text(json.dumps(settings))


def adapter_shapes(config: AdapterConfig, rows: int, width: int) -> dict[str, tuple[int, int]]:
    """Tensors of the adapter of one Hugging Face layer of `rows` outputs and `width` inputs, by name in files."""
    rank = config.rank
    if config.method == "lora":
        return {"lora_A.weight": (rank, width), "lora_B.weight": (rows, rank)}
    attention = {"alora_attention_in": (3 * rank, rank), "alora_attention_out": (rank, rank)}
    return {"alora_A": (rank, width), "alora_B": (rows, rank), **attention}


def _matches(layer: str, pattern: str) -> bool:
    return fnmatchcase(layer, pattern) or fnmatchcase(layer.rsplit(".", 1)[1], pattern)
