"""Everything a run is made of, built in the order in which it can fail: checks first, memory next, data last."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer

from megatron_mixcpt.adapters.files import check_directory
from megatron_mixcpt.adapters.layout import check_adapter_layout
from megatron_mixcpt.architecture.architecture import PRESETS, Architecture
from megatron_mixcpt.architecture.stages import stages_of
from megatron_mixcpt.checkpoint.origin import find_origin
from megatron_mixcpt.checkpoint.start import load_model_weights, start_adapters
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.dataset import check_files
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.tokenizers import extended_vocab_size
from megatron_mixcpt.huggingface.weights import weights_fingerprint
from megatron_mixcpt.model.build import build_gpt
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.model.load import load_hf
from megatron_mixcpt.model.routing import RouterSettings
from megatron_mixcpt.model.stage import Stage, Start
from megatron_mixcpt.objectives.build import build_task, read_training_mix
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.objectives.task import Task
from megatron_mixcpt.plan.estimate import checkpoint_bytes
from megatron_mixcpt.runtime.parallel import ParallelState, check_grid
from megatron_mixcpt.teacher.build import check_teacher
from megatron_mixcpt.train.forgetting import require_held, sources_of
from megatron_mixcpt.train.optimizer import build_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Components:
    """What the loop works with."""

    mix: Mix
    arch: Architecture
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    task: Task
    run: ForwardBackward
    validation: ForwardBackward
    start: Start


def read_model_and_mix(config: Config) -> tuple[Architecture, Mix]:
    """Read what the configuration points at and check that the parts fit; opens no weights.

    Tokens that the data's tokenizer adds to the model's own become new rows of the embedding.

    Raises ConfigError naming the key to change, and VerificationError where the data was made with another tokenizer.
    """
    mix = read_training_mix(config)
    return checked_model(config, read_architecture(config, mix), mix), mix


def read_architecture(config: Config, mix: Mix) -> Architecture:
    """The model of the configuration, with rows for the tokens that the data's tokenizer adds. Raises as above."""
    if config.model.hf is not None:
        arch = architecture_from_hf(config.model.hf)
        if mix.tokenizer_dir.is_dir():
            rows = extended_vocab_size(config.model.hf, mix.tokenizer_dir, arch.vocab_size)
            arch = dataclasses.replace(arch, vocab_size=rows)
        return arch
    if config.model.checkpoint is not None:
        return _checkpoint_architecture(config.model.checkpoint, mix, config.run_dir)
    if config.model.preset not in PRESETS:
        raise ConfigError(f"model.preset: {config.model.preset!r} is none of {', '.join(PRESETS)}")
    return dataclasses.replace(
        PRESETS[config.model.preset],
        vocab_size=mix.vocab_size,
        max_position_embeddings=max(PRESETS[config.model.preset].max_position_embeddings, mix.seq_length),
    )


def checked_model(config: Config, arch: Architecture, mix: Mix) -> Architecture:
    """`arch`. Raises ConfigError, naming the key to change, unless it fits the data, and the cuts of the grid."""
    if mix.vocab_size > arch.vocab_size:
        raise ConfigError(
            f"data.mix: the tokenizer of {mix.path} has {mix.vocab_size} entries, the model only {arch.vocab_size}: "
            "preprocess with the model's own tokenizer"
        )
    if mix.seq_length > arch.max_position_embeddings:
        raise ConfigError(
            f"data.seq_length {mix.seq_length} exceeds the model's {arch.max_position_embeddings} positions: "
            "preprocess with a smaller seq_length"
        )
    if config.train.router == "trained" and not arch.num_experts:
        raise ConfigError("train.router trained: this model has no experts: remove it")
    stages = stages_of(config, arch)
    if config.adapter is not None:
        check_adapter_layout(arch, config.adapter, config.parallel.tensor, stages)
    return arch


def _checkpoint_architecture(checkpoint: str, mix: Mix, run_dir: str) -> Architecture:
    if Path(run_dir).resolve() in (Path(checkpoint).resolve(), *Path(checkpoint).resolve().parents):
        raise ConfigError(
            f"model.checkpoint {checkpoint} is part of run_dir itself: a run resumes without it; to start anew from "
            "its weights set another run_dir"
        )
    origin = find_origin(Path(checkpoint), verify=False)  # loading verifies it, once
    if origin.tokenizer_dir and origin.tokenizer_dir.is_dir() and mix.tokenizer_dir.is_dir():
        rows = extended_vocab_size(origin.tokenizer_dir, mix.tokenizer_dir, origin.arch.vocab_size)
        if rows > origin.arch.vocab_size:
            raise ConfigError(
                f"model.checkpoint: {checkpoint} has {origin.arch.vocab_size} embedding rows, the tokenizer of "
                f"{mix.path} needs {rows}: convert again with --tokenizer {mix.tokenizer_dir}"
            )
    return origin.arch


def check_layout(config: Config, world_size: int) -> tuple[Architecture, Mix]:
    """Raise ConfigError, naming the key to change, unless model, data and grid fit together."""
    arch, mix = read_model_and_mix(config)
    check_rows(config, mix, world_size)
    return arch, mix


def check_rows(config: Config, mix: Mix, world_size: int) -> None:
    """Raise ConfigError unless the ranks fill the grid and it cuts rows evenly."""
    if world_size < 1:
        raise ConfigError(f"--nproc {world_size}: at least 1")
    grid = config.parallel
    check_grid(world_size, grid.tensor, grid.pipeline, grid.context, grid.expert)
    row_length = config.row_sequences * mix.seq_length
    if row_length % grid.context or (grid.sequence and row_length // grid.context % grid.tensor and grid.context > 1):
        also = f" x parallel.tensor {grid.tensor}, which parallel.sequence needs" if grid.sequence else ""
        raise ConfigError(
            f"data.seq_length: rows of {row_length} tokens do not divide by parallel.context {grid.context}{also}: "
            "change one of them"
        )
    if config.parallel.sequence and mix.seq_length % config.parallel.tensor:
        raise ConfigError(
            f"data.seq_length {mix.seq_length} is not a multiple of parallel.tensor {config.parallel.tensor}, "
            "which parallel.sequence needs"
        )


def check_settings(config: Config, world_size: int) -> tuple[Architecture, Mix]:
    """Raise ConfigError, naming the key to change, unless model, data, grid, batch and teacher fit together."""
    arch, mix = check_layout(config, world_size)
    check_batch(config, world_size)
    kinds = sorted({source.kind for source in mix.train_sources})
    if config.kind != "dpo" and not any(map(config.loss.teaches, kinds)):
        raise ConfigError(
            f"loss.by_kind leaves no weight on what is trained on ({', '.join(kinds)}): there is nothing to learn from"
        )
    if config.forget is not None:
        sources_of(config.forget, mix, config.eval.limit)
        require_held(config, mix)
    if config.uses_teacher:
        check_teacher(config, arch, mix)
    return arch, mix


def check_batch(config: Config, world_size: int) -> None:
    """Raise ConfigError unless the global batch divides over the data-parallel ranks."""
    data_size = world_size // config.parallel.replica
    stride = config.train.micro_batch_size * data_size
    if config.train.global_batch_size % stride:
        raise ConfigError(
            f"train.global_batch_size {config.train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{config.train.micro_batch_size} x {data_size} data-parallel ranks = {stride}: change one of them"
        )
    grid, count = config.parallel, config.train.global_batch_size // stride
    if grid.interleave > 1 and count % grid.pipeline:
        raise ConfigError(
            f"parallel.interleave {grid.interleave} needs a number of micro-batches that parallel.pipeline "
            f"{grid.pipeline} divides, not {count}: change train.global_batch_size or train.micro_batch_size"
        )


def check(config: Config, world_size: int) -> None:
    """Raise ConfigError, naming the key to change, unless everything that a run needs fits together, disk included."""
    arch, mix = check_settings(config, world_size)
    if config.kind != "dpo":  # whose rows are packed from all pairs before anything is written
        check_files(mix)
    if Path(config.run_dir).exists() and not Path(config.run_dir).is_dir():
        raise ConfigError(f"run_dir {config.run_dir} is a file: set another one")
    if config.adapter is not None and config.adapter.init:
        check_directory(Path(config.adapter.init), arch, config.adapter)
    needed, folder = checkpoint_bytes(arch, config.train.dtype, config.adapter), existing_parent(Path(config.run_dir))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run_dir {config.run_dir}: one checkpoint takes {needed / 2**30:.2f} GiB, but {folder} has "
            f"{free / 2**30:.2f} GiB left: free some space or set another run_dir"
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above (or at) `path` that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def build(config: Config, state: ParallelState, heartbeat: Callable[[str], None] = lambda phase: None) -> Components:
    """Build model, task (its teacher or reference) and optimizer at the starting weights. Collective."""
    arch, mix = read_model_and_mix(config)
    stage = build_stage(config, arch)
    task = build_task(config, mix, arch, stage, state, lambda: empty_stage(config, arch), heartbeat)
    model = DistributedDataParallel(
        stage.model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.train.overlap_grad_reduce,
            use_distributed_optimizer=config.train.distributed_optimizer,
        ),
        stage.model,
    )
    # The schedule knows the parts of an interleaved pipeline, the gradients lie in what wraps them all.
    stage.model.config.finalize_model_grads_func = lambda _, *args, **kwargs: finalize_model_grads(
        [model], *args, **kwargs
    )
    if config.train.overlap_grad_reduce:
        stage.model.config.no_sync_func = model.no_sync
    optimizer = build_optimizer(model, config.train, config.optimizer)

    contributes = state.is_last_stage and state.tensor_rank == 0
    run = ForwardBackward(model, task.objective, num_sources=len(mix.train_sources), contributes=contributes)
    validation = ForwardBackward(
        model, task.validation, num_sources=config.train.micro_batch_size, contributes=contributes
    )
    return Components(mix, arch, model, optimizer, task, run, validation, stage.start)


def build_stage(config: Config, arch: Architecture) -> Stage:
    """This rank's pipeline stage at the starting weights. Collective."""
    model = empty_stage(config, arch, seed=config.train.seed if config.model.preset else None)
    adapter = None
    if config.adapter:
        start_adapters(model, config.train.seed)
        if config.adapter.init:
            adapter = weights_fingerprint(config.adapter.init)
    return Stage(model, Start(load_start(model, config), adapter))


def load_start(model: StageModel, config: Config) -> str | None:
    """Read the weights that the configuration begins with into `model`; returns their fingerprint, or None for those of
    a preset, which are drawn and not read. Collective."""
    if config.model.hf:
        load_hf(model, config.model.hf)
        return weights_fingerprint(config.model.hf)
    return load_model_weights(model, Path(config.model.checkpoint)) if config.model.checkpoint else None


def empty_stage(config: Config, arch: Architecture, *, seed: int | None = None) -> StageModel:
    """This rank's pipeline stage with random weights (see `build_gpt`), or without a seed uninitialised."""
    return build_gpt(
        arch,
        sequence_parallel=config.parallel.sequence,
        params_dtype=DTYPES[config.train.dtype],
        recompute=config.train.recompute,
        seed=seed,
        adapter=config.adapter,
        stages=stages_of(config, arch),
        router=RouterSettings(
            trained=config.train.router == "trained", balance=config.train.router_balance, z=config.train.router_z
        ),
    )
