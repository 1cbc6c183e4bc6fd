"""Runs of the trainer on a claimed device: what waits is told apart by phase, what is resident by part."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_mixcpt.checkpoint import Saver
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.data.batch import Batch, train_batches
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.teacher.initial import ModelTeacher
from megatron_mixcpt.train import dry_run, loop, setup
from megatron_mixcpt.train.agreement import agree
from megatron_mixcpt.train.bookkeeping import Bookkeeping
from megatron_mixcpt.train.optimizer import optimizer_step
from megatron_mixcpt.train.saving import RunSaver
from megatron_mixcpt.train.validation import INDEX_CACHE, RunValidation
from tests.device.claimed import claimed_device
from tests.device.residency import CPU, Residency
from tests.train.runs import grid_of

STEP, VALIDATION, SAVE = "step", "validation", "save"

# What is made on the device while these run, and nothing else that is listed, belongs to the part.
PARTS = (
    (setup, "build_stage", "weights"),
    (setup, "build_task", "teacher"),
    (setup, "build_optimizer", "optimizer"),
    (dry_run, "allocate_state", "optimizer"),
    (loop, "optimizer_step", "optimizer"),
    (Batch, "here", "batch"),
    (ModelTeacher, "begin_step", "teacher"),
    (ModelTeacher, "target", "teacher"),
    (MixGPTModel, "output_logits", "logits"),
)
PHASES = (
    (RunValidation, "__call__", VALIDATION),
    (RunSaver, "save", SAVE),
    (Saver, "finish", SAVE),
    (loop, "conclude", "end"),
)


@contextlib.contextmanager
def told_apart(memory: torch.device = CPU) -> Iterator[Residency]:
    """As `claimed_device`, with the parts and phases of a run; what is in no other phase after the first step begins is
    of a step."""
    with claimed_device(memory) as residency, contextlib.ExitStack() as stack:
        for openers, watched in ((residency.part, PARTS), (residency.phase, PHASES)):
            for owner, name, of in watched:
                within = _within(functools.partial(openers, of), getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, within))
        wrapped = functools.partial(_wrapped, residency, setup.DistributedDataParallel)
        stack.enter_context(mock.patch.object(setup, "DistributedDataParallel", wrapped))
        steps = contextlib.ExitStack()
        stack.enter_context(steps)
        stack.enter_context(mock.patch.object(Bookkeeping, "begin_step", _stepping(residency, steps)))
        yield residency


def run(values: dict[str, Any]) -> Residency:
    """Train `values`, a configuration, as `mixcpt train` would."""
    with told_apart() as residency:
        loop.train(validate(Config, values, "test"))
    return residency


def one_step(values: dict[str, Any]) -> Residency:
    """The first step of `values`, without what is around steps."""
    config = validate(Config, values, "test")
    size, seed = config.train.micro_batch_size, config.train.seed
    with told_apart() as residency, grid_of(config) as state:
        components = setup.build(config, state)
        batches = train_batches(
            components.task.train_dataset(seed, Path(config.run_dir) / INDEX_CACHE),
            Position.start(components.mix, seed),
            components.task.collate,
            micro_batch_size=size,
            data_rank=state.data_rank,
            data_size=state.data_size,
            num_workers=0,
            device=state.device,
        )
        StopRequest().agreed(state.device)
        drawn = [next(batches) for _ in range(config.train.global_batch_size // (size * state.data_size))]
        with residency.phase(STEP):
            components.model.zero_grad_buffer()
            components.optimizer.zero_grad()
            agree(components.run(drawn), 0, stop=False)
            with residency.part("optimizer"):
                optimizer_step(components.optimizer, 0, config.train)
    return residency


def _within(opened: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with opened():
            return function(*args, **kwargs)

    return inside


def _wrapped(residency: Residency, wrap: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Megatron's wrapper takes buffers for gradients, and with the distributed optimizer one for the weights."""
    with residency.part("gradients"):
        model = wrap(*args, **kwargs)
    for parameter in model.parameters():
        residency.take(parameter, "weights")
    return model


def _stepping(residency: Residency, steps: contextlib.ExitStack) -> Callable[..., None]:
    original = Bookkeeping.begin_step

    def begin(book: Bookkeeping, step: int) -> None:
        steps.pop_all().close()
        steps.enter_context(residency.phase(STEP))
        original(book, step)

    return begin
