"""From a configuration to its rehearsal: start, stop after half of the steps, resume, look at what came out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import yaml

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.rehearse.excerpt import write_excerpt
from megatron_mixcpt.rehearse.grid import data_parallel_size, fitting_grid
from megatron_mixcpt.rehearse.scale import (
    REPLACED_TEACHERS,
    STEPS,
    expert_ranks,
    small_architecture,
    small_run,
    write_random_model,
)
from megatron_mixcpt.rehearse.size import Grid
from megatron_mixcpt.runtime.launcher import launch, ranks_of_our_own
from megatron_mixcpt.runtime.scratch import scratch_folder
from megatron_mixcpt.train.setup import DTYPES, check_settings

SEQ_LENGTH = 256  # at most


def rehearse(config: Config, nproc: int | None) -> int:
    """Rehearse a run of `nproc` ranks; returns an exit code.

    Raises ConfigError for what `mixcpt train` would refuse, and where this machine has no memory for one replica.
    """
    data_size = data_parallel_size(config, nproc)
    arch, mix = check_settings(config, nproc or config.parallel.replica * data_size)
    seq_length = min(mix.seq_length, SEQ_LENGTH)
    parts = config.parallel.pipeline * config.parallel.interleave
    small = small_architecture(arch, config.parallel.tensor, parts, seq_length)
    grid = fitting_grid(config, arch, data_size, small, dataclasses.replace(mix, seq_length=seq_length))
    for line in _program(config, arch, small, grid, data_size, seq_length, mix.seq_length):
        print(line, flush=True)

    with scratch_folder("mixcpt-rehearsal-") as folder:
        write_random_model(small, folder / "model", DTYPES[config.train.dtype], config.train.seed)
        excerpt = write_excerpt(mix, folder / "data", seq_length)
        values = small_run(config, arch, data_size, grid, folder / "model", excerpt, folder / "run")
        path = folder / "rehearsal.yaml"
        path.write_text(yaml.safe_dump(values))
        rows: list[str] = []
        for act, steps in (("the first steps", STEPS // 2), ("resuming", STEPS)):
            code = _train(path, steps, grid.world_size)
            if code != 0:
                print(f"rehearsal: {act} failed with exit code {code}, as the run itself would: see above")
                return code
            rows = _checked(folder / "run" / "metrics.jsonl", steps, rows)
        saves = sum("ckpt/seconds" in json.loads(row) for row in rows)
    print(f"rehearsal: all went well: {STEPS} steps, validation, {saves} saves, a resume from step {STEPS // 2}")
    return 0


def _program(
    config: Config, arch: Architecture, small: Architecture, grid: Grid, data_size: int, seq_length: int, whole: int
) -> list[str]:
    """What is going to be rehearsed, and what is not."""
    data = f"data {grid.data}" + (f" in place of {data_size}" if grid.data < data_size else "")
    if config.parallel.expert > 1:
        few = expert_ranks(config, grid)
        data += f" with experts over {few} of them" + f" in place of {config.parallel.expert}" * (
            few < config.parallel.expert
        )
    lines = [
        f"rehearsal: tensor {grid.tensor} x pipeline {grid.pipeline} "
        + f"x context {grid.context} " * (grid.context > 1)
        + f"x {data} = {grid.world_size} processes, gloo",
        f"model      {small.num_layers} of {arch.num_layers} layers, hidden {small.hidden_size} of {arch.hidden_size}, "
        f"{small.num_attention_heads} heads in {small.num_query_groups} groups of {arch.num_attention_heads} in "
        f"{arch.num_query_groups}, random weights, {config.train.dtype}",
        f"data       {seq_length} of {whole} tokens a sample, the first samples of every source",
        "not part   memory, speed, NCCL and GPU kernels",
    ]
    if config.uses_teacher and config.teacher.source in REPLACED_TEACHERS:
        lines[-1] += f"; teacher.source {config.teacher.source}: initial stands in for it"
    return lines


def _train(path: Path, steps: int, nproc: int) -> int:
    """`mixcpt train` on the CPU."""
    with ranks_of_our_own("cpu"):
        return launch(nproc, ["train", str(path), f"train.steps={steps}"])


def _checked(path: Path, steps: int, before: list[str]) -> list[str]:
    """Lines of metrics.jsonl. Raises MixcptError unless they are of `steps` steps with finite losses that go on from
    the lines `before`."""
    rows = path.read_text().splitlines()
    losses = {row["step"]: row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row}
    if sorted(losses) != list(range(1, steps + 1)) or None in losses.values():
        raise MixcptError(f"rehearsal: the losses of {steps} steps are {losses}")
    if rows[: len(before)] != before:
        raise MixcptError("rehearsal: the second start did not go on from the checkpoint of the first")
    return rows
