"""Train a few steps on some process grid and bring losses, gradients and weights back whole, to compare grids."""

import json
import math
import os
import shutil

import torch

from megatron_mixcpt.architecture.layout import is_of_experts, unshard
from megatron_mixcpt.checkpoint import list_checkpoints
from megatron_mixcpt.config import Config
from megatron_mixcpt.config import validate as validated
from megatron_mixcpt.data.batch import collate, train_batches
from megatron_mixcpt.data.dataset import train_dataset, valid_datasets
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.objectives.mixcpt import STATISTICS
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.train.optimizer import optimizer_step
from megatron_mixcpt.train.setup import build
from megatron_mixcpt.train.validation import validate


def settings(mix, run_dir, **sections):
    """A small configuration; keyword arguments are merged into its sections."""
    values = {
        "model": {"preset": "tiny"},
        "data": {"mix": str(mix)},
        "train": {
            "steps": 4,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "lr": 1e-3,
            "warmup_steps": 1,
            "dtype": "fp32",
        },
        "loss": {"by_kind": {"instruction": {"ce": 0.5, "kd": 2.0}}},
        "run_dir": str(run_dir),
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return values


def whole_tensors(components, state, value):
    """`{name: whole tensor}` of `value(parameter)` over the grid, on every rank; tied copies must agree."""
    stage = components.model.module
    if stage.adapter is not None:
        return _whole_adapters(stage, state, value)
    local = {slot.name: value(slot.parameter).detach().clone() for slot in stage.slots()}
    gathered = [None] * state.world_size
    torch.distributed.all_gather_object(gathered, (state.expert_rank, state.tensor_rank, local))
    shards = {}
    for expert_rank, tensor_rank, tensors in gathered:
        for name, tensor in tensors.items():
            place = expert_rank if is_of_experts(name) else 0, tensor_rank
            known = shards.setdefault(name, {}).setdefault(place, tensor)
            assert torch.equal(known, tensor), f"{name}: copies differ"
    vocab_size, experts = components.arch.vocab_size, state.expert_size
    return {
        name: unshard(name, [of[place] for place in sorted(of)], vocab_size, experts).numpy()
        for name, of in shards.items()
    }


def _whole_adapters(stage, state, value):
    local = {}
    for adapter in stage.adapters():
        expert_rank = state.expert_rank if adapter.layout.experts else 0
        for name, (_, axis) in adapter.layout.tensors().items():
            tensor = value(adapter.get_parameter(name)).detach().clone()
            local[adapter.layout.key(name)] = (axis, expert_rank, tensor)
    gathered = [None] * state.world_size
    torch.distributed.all_gather_object(gathered, (state.tensor_rank, local))
    shards = {}
    for tensor_rank, tensors in gathered:
        for key, (axis, expert_rank, tensor) in tensors.items():
            place = expert_rank, 0 if axis is None else tensor_rank
            known = shards.setdefault(key, (axis, {}))[1].setdefault(place, tensor)
            assert torch.equal(known, tensor), f"{key}: copies differ"
    return {key: _joined(axis, of).numpy() for key, (axis, of) in shards.items()}


def _joined(axis, parts):
    """`parts`: by (expert rank, tensor rank)."""
    by_expert = {}
    for place in sorted(parts):
        by_expert.setdefault(place[0], []).append(parts[place])
    return torch.cat([of[0] if axis is None else torch.cat(of, axis) for of in by_expert.values()])


def grid_of(config):
    return parallel_context(**config.parallel.sizes, seed=config.train.seed)


def run_steps(values):
    """Train `values` (a configuration) from the start; call in every rank.

    Returns losses and gradient norms by step, the latter as megatron-core computes them too, the first step's gradients
    and the final weights, whole, what the trained model scores on the held-out data, and what the routers of a mixture
    of experts did in each step.
    """
    config = validated(Config, values, "test")
    with grid_of(config) as state:
        components = build(config, state)
        batch_size, micro = config.train.global_batch_size, config.train.micro_batch_size
        batches = train_batches(
            train_dataset(components.mix, 1234, _cache(config)),
            Position.start(components.mix, 1234),
            micro_batch_size=micro,
            data_rank=state.data_rank,
            data_size=state.data_size,
            num_workers=0,
            device=state.device,
        )
        losses, norms, gradients, routed = [], [], {}, []
        expected = []

        def admits(norm):
            expected.append(components.optimizer.get_grad_norm())
            return math.isfinite(norm)

        for step in range(config.train.steps):
            components.model.zero_grad_buffer()
            components.optimizer.zero_grad()
            totals = components.run([next(batches) for _ in range(batch_size // (micro * state.data_size))])
            torch.distributed.all_reduce(totals)
            if (sums := components.run.routed()) is not None:
                torch.distributed.all_reduce(sums := sums.clone())
                routed.append(sums.tolist())
            if step == 0 and not config.train.distributed_optimizer:  # which leaves each rank a part of the gradient
                gradients = whole_tensors(components, state, lambda parameter: parameter.main_grad)
            losses.append((totals[:, STATISTICS.index("loss")].sum() / totals[:, 0].sum()).item())
            norms.append(optimizer_step(components.optimizer, step, config.train, admits))
        weights = whole_tensors(components, state, lambda parameter: parameter.data.float())
        measured, _ = validate(
            dict(valid_datasets(components.mix, 1234, _cache(config))),
            components.validation,
            collate,
            components.task.validation_metrics,
            state=state,
            micro_batch_size=micro,
            max_samples=None,
            stop_requested=lambda: False,
        )
    return {
        "losses": losses,
        "norms": norms,
        "megatron's norms": expected,
        "gradients": gradients,
        "weights": weights,
        "validation": measured,
        "routed": routed,
    }


def run_all(rank, world_size, runs):
    """`runs`: `{name: (port, values)}`; results by name."""
    results = {}
    for name, (port, values) in runs.items():
        os.environ["MASTER_PORT"] = str(port)
        results[name] = run_steps(values)
    return results


def _cache(config):
    from pathlib import Path

    return Path(config.run_dir) / "index_cache"


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def saved_tensors(checkpoint):
    """Every tensor of a checkpoint, whole, by key."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(checkpoint))
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def keep_only_step(run_dir, step):
    """As if the run had died between the checkpoint of `step` and its next."""
    for checkpoint in list_checkpoints(run_dir / "checkpoints"):
        if checkpoint.name != f"step_{step:08d}":
            shutil.rmtree(checkpoint)
