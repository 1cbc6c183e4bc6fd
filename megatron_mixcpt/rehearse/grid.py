"""The ranks that a run in small has: tensor, pipeline and context as they are, data as far as memory goes."""

from __future__ import annotations

from pathlib import Path

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.plan.estimate import make_plan
from megatron_mixcpt.rehearse.scale import small_run
from megatron_mixcpt.rehearse.size import Grid
from megatron_mixcpt.runtime.memory import available_memory

MAX_DATA_SIZE = 2
LIBRARIES_GIB = 0.8  # of a process and its data worker, measured


def data_parallel_size(config: Config, nproc: int | None) -> int:
    """Replicas of the model in a run of `nproc` ranks; None: the user names no number."""
    grid, train = config.parallel, config.train
    if nproc:
        return nproc // grid.replica
    fewest = grid.fewest // grid.replica
    more = -(-MAX_DATA_SIZE // fewest) * fewest
    return more if train.global_batch_size % (more * train.micro_batch_size) == 0 else fewest


def fitting_grid(config: Config, arch: Architecture, data_size: int, small: Architecture, mix: Mix) -> Grid:
    """The grid of the run of `small`, in place of `arch`, on `mix`. Raises ConfigError where one replica does not fit
    this machine."""
    tensor, pipeline, context = config.parallel.tensor, config.parallel.pipeline, config.parallel.context
    free, gib = available_memory() / 2**30, 0.0
    for data in range(min(data_size, MAX_DATA_SIZE), 0, -1):
        grid = Grid(tensor, pipeline, data, context)
        values = small_run(config, arch, data_size, grid, Path("model"), mix.path, Path("run"))
        run = validate(Config, values, "rehearsal")
        stages = make_plan(run, small, mix, grid.world_size, gpu=False).stages
        gib = LIBRARIES_GIB + max(stage.total + stage.snapshot for stage in stages) / 2**30
        if grid.world_size * gib <= free:
            return grid
    raise ConfigError(
        f"parallel.tensor={tensor} x parallel.pipeline={pipeline} x parallel.context={context} takes "
        f"{tensor * pipeline * context} processes of about "
        f"{gib:.1f} GiB, but {free:.1f} GiB are free: take a larger machine, for example a compute node"
    )
