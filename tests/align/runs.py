"""Align on some process grid and bring loss, gradients and metrics back whole."""

import os

import numpy as np
import torch

from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.select.config import SelectConfig
from megatron_mixcpt.select.select import select
from megatron_mixcpt.train.agreement import agree
from megatron_mixcpt.train.loop import train
from megatron_mixcpt.train.setup import build
from tests.train.runs import grid_of, whole_tensors


def first_step(values):
    """Loss, metrics and whole gradients of the first global batch, with a reference moved away from the start."""
    config = validate(Config, values, "test")
    with grid_of(config) as state:
        parts = build(config, state)
        task, size = parts.task, config.train.micro_batch_size
        reference = {prefix.name: rows.reference.copy() for prefix, rows in task.datasets.items()}
        for rows in task.datasets.values():
            rows.reference = rows.reference + np.random.default_rng(5).normal(size=rows.reference.shape)
        rows = task.train_dataset(0, None).datasets[0]
        mine = range(state.data_rank * size, config.train.global_batch_size, state.data_size * size)
        batches = [task.collate([rows[j % len(rows)] for j in range(i, i + size)]) for i in mine]
        parts.model.zero_grad_buffer()
        totals = agree(parts.run([batch.to(state.device) for batch in batches]), 0, stop=False)
        gradients = whole_tensors(parts, state, lambda parameter: parameter.main_grad)
    metrics = task.metrics(totals.rows[0], {})
    return {"loss": totals.loss, "metrics": metrics, "gradients": gradients, "reference": reference}


def first_steps(rank, world_size, runs):
    """`runs`: `{name: (port, values)}`; results by name."""
    results = {}
    for name, (port, values) in runs.items():
        os.environ["MASTER_PORT"] = str(port)
        results[name] = first_step(values)
    return results


def train_all(rank, world_size, runs):
    """Run `[(port, configuration), ...]` one after the other, as `mixcpt align` would."""
    for port, values in runs:
        os.environ["MASTER_PORT"] = str(port)
        torch.manual_seed(0)
        config = validate(Config, values, "test")
        train(config)


def align_values(mix, **sections):
    return {
        "model": {"preset": "tiny"},
        "data": {"mix": str(mix)},
        "train": {"steps": 2, "dtype": "fp32"},
        "align": {"method": "dpo"},
        "run_dir": "unused",
        **sections,
    }


def select_values(stage1, model, out, parallel=None, **settings):
    return {
        "model": model,
        "data": {"mix": str(stage1 / "mix.json")},
        "parallel": parallel or {},
        "select": {"n": 20, "pairs": 12, "dtype": "fp32", "micro_batch_tokens": 256, **settings},
        "out": str(out),
    }


def select_all(rank, world_size, runs):
    for port, run in runs:
        os.environ["MASTER_PORT"] = str(port)
        select(validate(SelectConfig, run, "test"))
