"""Process groups, device and seeds of this process: the tensor x context x data x pipeline grid, with experts over
data and context ranks."""

import contextlib
import functools
import gc
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime import leaving
from megatron_mixcpt.runtime.cpu_backend import cpu_backend
from megatron_mixcpt.runtime.devices import agree_on_device, take_device

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_contexts = itertools.count()


@dataclass(frozen=True)
class ParallelState:
    """Where this process stands in the grid. Groups are `torch.distributed` process groups."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: dist.ProcessGroup
    context_rank: int
    context_size: int
    context_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    expert_rank: int
    expert_size: int
    replica_group: dist.ProcessGroup
    """The ranks that share one model replica: tensor x context x pipeline."""
    store: dist.Store

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def replica_size(self) -> int:
        return self.tensor_size * self.context_size * self.pipeline_size

    @property
    def speaks_for_replica(self) -> bool:
        """Whether what all ranks of the replica know is counted here: one of them, on the last stage."""
        return self.is_last_stage and self.tensor_rank == self.context_rank == 0


def _launch() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) from the environment, or None where nothing launched several processes."""
    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    if missing:
        raise ConfigError(
            f"RANK or WORLD_SIZE is set but {', '.join(missing)} is not: start several processes with "
            "`mixcpt train --nproc N` or torchrun, or unset them for one process"
        )
    rank = integer_variable("RANK", 0)
    return rank, integer_variable("WORLD_SIZE", 1), integer_variable("LOCAL_RANK", rank)


def integer_variable(name: str, default: int) -> int:
    """An environment variable that launchers set. Raises ConfigError where it is no number."""
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isdecimal():
        raise ConfigError(f"the environment variable {name} is {value!r}, not a number: unset it, or use a launcher")
    return int(value)


@functools.cache
def _launch_store(address: str, port: str, timeout: timedelta) -> dist.Store:
    """The launcher's key-value store. Kept for the life of the process: its port cannot be bound twice."""
    return next(rendezvous("env://", timeout=timeout))[0]


def _store(launched: bool, timeout: timedelta) -> dist.Store:
    """A store for one context, with keys of its own: gloo would meet the previous one's stale addresses."""
    if not launched:
        return dist.HashStore()
    shared = _launch_store(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], timeout)
    return dist.PrefixStore(f"mixcpt-{next(_contexts)}", shared)


def check_grid(world_size: int, tensor: int, pipeline: int, context: int = 1, expert: int = 1) -> None:
    """Raise ConfigError unless the processes divide into whole model replicas, and these into whole sets of experts."""
    replica = tensor * pipeline * context
    if min(tensor, pipeline, context) < 1 or world_size % replica:
        also = f" x parallel.context={context}" if context != 1 else ""
        raise ConfigError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline}{also} needs a multiple of {replica} "
            f"processes, not {world_size}: change the layout or the number of processes (--nproc, or nodes x GPUs a "
            "node)"
        )
    others = world_size // (tensor * pipeline)
    if expert < 1 or others % expert:
        raise ConfigError(
            f"parallel.expert={expert} does not divide the {others} data- and context-parallel ranks that {world_size} "
            f"processes leave beside parallel.tensor={tensor} x parallel.pipeline={pipeline}: change it or the number "
            "of processes"
        )


@contextlib.contextmanager
def parallel_context(
    tensor: int = 1,
    pipeline: int = 1,
    seed: int = 1234,
    timeout_minutes: float = 10,
    *,
    context: int = 1,
    interleave: int = 1,
    expert: int = 1,
) -> Iterator[ParallelState]:
    """Join the processes into a tensor x context x data x pipeline grid for the duration of the context.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; with none set this is a grid of one process. With
    CUDA the backend is nccl and each process takes the device of its local rank; otherwise gloo and the CPU backend.
    `MIXCPT_DEVICE` (cpu, cuda) says which it must be; all ranks agree on it before any of them waits. Everything is
    taken down at exit; after an error the process ends, whatever NCCL is waiting for (leaving.py). With `interleave`
    above 1, models are cut into that many parts a pipeline rank, and Megatron's schedule is the interleaved one.
    `expert`: ranks, of data and context, that have some of the experts of a mixture each.

    Raises:
        ConfigError: the processes do not divide into whole model replicas, the launch variables are incomplete, or a
            rank has not the device that the others have.
    """
    launch = _launch()
    rank, world_size, local_rank = launch or (0, 1, 0)
    check_grid(world_size, tensor, pipeline, context, expert)
    timeout = timedelta(minutes=timeout_minutes)
    with contextlib.ExitStack() as stack:
        stack.callback(gc.collect)  # of a model's cycles, which keep the groups and their threads
        store = _store(launch is not None, timeout)
        device = agree_on_device(store, rank, world_size, local_rank, timeout) if launch else take_device(local_rank)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "gloo":
            stack.enter_context(cpu_backend())
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
                device_id=device if backend == "nccl" else None,
            )
            stack.callback(dist.destroy_process_group)
            yield _join_grid(
                stack,
                store,
                rank,
                world_size,
                local_rank,
                device,
                tensor,
                pipeline,
                context,
                interleave,
                expert,
                seed,
                timeout_minutes,
            )
        except BaseException as error:
            if launch and backend in leaving.CAN_HANG:
                leaving.end_within(leaving.GRACE_SECONDS, error)
            raise


def seed_step(state: ParallelState, seed: int, step: int) -> None:
    """Make what a step draws (dropout) a function of seed, step and place in the grid, so that nothing of it need be
    saved. Tensor ranks share one stream of torch's generator, and have one each in megatron-core's tracker."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    place = (seed, step, state.data_rank * state.context_size + state.context_rank, state.pipeline_rank)
    drawn = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 2  # room for megatron-core's offsets
    torch.manual_seed(drawn)
    model_parallel_cuda_manual_seed(drawn)


def _join_grid(
    stack: contextlib.ExitStack,
    store: dist.Store,
    rank: int,
    world_size: int,
    local_rank: int,
    device: torch.device,
    tensor: int,
    pipeline: int,
    context: int,
    interleave: int,
    expert: int,
    seed: int,
    timeout_minutes: float,
) -> ParallelState:
    # Imported here: megatron-core takes seconds, and errors above should not wait for it.
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=interleave if interleave > 1 else None,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,  # beside the ones in use; nothing here asks for them
    )
    stack.callback(parallel_state.destroy_model_parallel)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    # The tracker is a global of megatron-core and refuses a seed twice: leave none behind.
    stack.callback(initialize_rng_tracker, force_reset=True)
    return ParallelState(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=device,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline,
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=context,
        context_group=parallel_state.get_context_parallel_group(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=world_size // (tensor * pipeline * context),
        data_group=parallel_state.get_data_parallel_group(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=expert,
        replica_group=_replica_group(world_size, tensor, pipeline, context),
        store=store,
    )


def _replica_group(world_size: int, tensor: int, pipeline: int, context: int) -> dist.ProcessGroup:
    """Collective. megatron-core has a group of tensor x pipeline only."""
    from megatron.core import parallel_state

    if context == 1:
        return parallel_state.get_model_parallel_group()
    inner, stage = tensor * context, world_size // pipeline  # ranks are counted tensor first, pipeline last
    replicas = [
        [first + s * stage + i for s in range(pipeline) for i in range(inner)] for first in range(0, stage, inner)
    ]
    group, _ = dist.new_subgroups_by_enumeration(replicas)
    return group
