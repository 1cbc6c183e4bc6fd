"""`mixcpt train`: load -> step -> log -> save -> validate."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from megatron_mixcpt.checkpoint import list_checkpoints, load_checkpoint, read_info, save_checkpoint
from megatron_mixcpt.config import Config, save_config
from megatron_mixcpt.data.batch import train_batches
from megatron_mixcpt.data.dataset import train_dataset, valid_datasets
from megatron_mixcpt.errors import ConfigError, MixcptError, StoppedError
from megatron_mixcpt.parallel import ParallelState, parallel_context
from megatron_mixcpt.train.optimizer import optimizer_step
from megatron_mixcpt.train.progress import Progress
from megatron_mixcpt.train.setup import Parts, build
from megatron_mixcpt.train.signals import StopRequest
from megatron_mixcpt.train.validate import validate

MAX_SKIPPED_IN_A_ROW = 5


def train(config: Config) -> None:
    """Train to `config.train.steps`, resuming from the newest checkpoint of the run directory.

    Raises StoppedError (exit code 75) when stopped by a signal, with everything saved; MixcptError when gradients stay
    non-finite.
    """
    with (
        StopRequest() as stop,
        parallel_context(config.parallel.tensor, config.parallel.pipeline, seed=config.train.seed) as state,
    ):
        _train(config, state, stop)


def _train(config: Config, state: ParallelState, stop: StopRequest) -> None:
    run_dir = Path(config.run_dir)
    if state.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    parts = build(config, state)
    step, tokens_by_source = _resume(config, parts)
    progress = Progress(config, state, parts, step, tokens_by_source)

    batch_size = config.train.global_batch_size
    cache = run_dir / "index_cache"
    dataset = train_dataset(parts.mix, config.train.steps * batch_size, config.train.seed, cache)
    valid = valid_datasets(parts.mix, config.train.seed, cache)
    micro_batches = batch_size // (config.train.micro_batch_size * state.data_size)
    batches = train_batches(
        dataset,
        consumed=step * batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=state.data_rank,
        data_size=state.data_size,
        num_workers=config.data.num_workers,
        device=state.device,
    )

    def save(step: int) -> None:
        began = time.monotonic()
        path = save_checkpoint(
            run_dir / "checkpoints",
            step,
            parts.model,
            parts.arch,
            parts.optimizer,
            info=progress.checkpoint_info(),
            keep=config.checkpoint.keep,
        )
        progress.saved(step, path, time.monotonic() - began)

    def evaluate(step: int) -> bool:
        metrics, stopping = validate(
            valid,
            parts.validation,
            state=state,
            micro_batch_size=config.train.micro_batch_size,
            max_samples=config.eval.max_samples,
            stop_requested=lambda: stop.agreed(state.device),
        )
        progress.validated(step, metrics)
        return stopping

    stopping = evaluate(step) if step == 0 else False  # what the model knew before
    skipped_in_a_row = 0
    while step < config.train.steps and not stopping:
        began = time.monotonic()
        step_batches = [next(batches) for _ in range(micro_batches)]
        data_seconds = time.monotonic() - began
        parts.model.zero_grad_buffer()
        parts.optimizer.zero_grad()
        totals = parts.run(step_batches)
        grad_norm = optimizer_step(parts.optimizer, step, config.train)
        step += 1

        stopping = progress.stepped(step, totals, grad_norm, data_seconds, time.monotonic() - began, stop.received)
        skipped_in_a_row = 0 if math.isfinite(grad_norm) else skipped_in_a_row + 1
        if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise MixcptError(
                f"step {step}: the gradient has not been finite for {skipped_in_a_row} steps in a row; they changed no "
                "weight, and the last checkpoint is intact. Lower train.lr, or look at the data of these steps"
            )
        last = step == config.train.steps
        if not stopping and (last or _due(step, config.eval.every)):
            stopping = evaluate(step)
        if stopping or last or _due(step, config.checkpoint.every):
            save(step)
    progress.close()
    if step < config.train.steps:
        raise StoppedError(
            f"stopped at step {step} of {config.train.steps} as asked, and saved: run the same command to go on"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _resume(config: Config, parts: Parts) -> tuple[int, dict[str, int]]:
    """Load the newest checkpoint of the run, if there is one: (steps done, tokens trained on by source)."""
    found = list_checkpoints(Path(config.run_dir) / "checkpoints")
    # All ranks decide on the same checkpoint, before any of them writes a new one.
    torch.distributed.barrier()
    if not found:
        return 0, {}
    info = read_info(found[0])
    if info["data_fingerprint"] != parts.mix.fingerprint:
        raise ConfigError(
            f"{found[0]} was trained on another mixture than {parts.mix.path}: restore that, or set another run_dir"
        )
    for key, now in (("dtype", config.train.dtype), ("global_batch_size", config.train.global_batch_size)):
        if info[key] != now:
            raise ConfigError(f"{found[0]} was trained with train.{key}={info[key]}, not {now}: set it back")
    load_checkpoint(found[0], parts.model, parts.optimizer)
    return info["step"], info["tokens_by_source"]
