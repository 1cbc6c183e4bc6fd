"""`mixcpt train` and `mixcpt align`: load -> step -> log -> save -> validate."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megatron_mixcpt.config import Config
from megatron_mixcpt.config.history import record_settings
from megatron_mixcpt.data.batch import train_batches
from megatron_mixcpt.errors import StoppedError
from megatron_mixcpt.observe.provenance import record_provenance
from megatron_mixcpt.runtime.failures import explained
from megatron_mixcpt.runtime.parallel import ParallelState, parallel_context, seed_step
from megatron_mixcpt.runtime.run_lock import hold
from megatron_mixcpt.runtime.stop import StopRequest, stopped_early
from megatron_mixcpt.runtime.timing import section
from megatron_mixcpt.runtime.watchdog import Watchdog
from megatron_mixcpt.train.agreement import agree
from megatron_mixcpt.train.bookkeeping import Bookkeeping
from megatron_mixcpt.train.concluding import conclude
from megatron_mixcpt.train.dry_run import dry_run
from megatron_mixcpt.train.ended import nothing_left
from megatron_mixcpt.train.optimizer import optimizer_step
from megatron_mixcpt.train.resume import resume
from megatron_mixcpt.train.saving import RunSaver
from megatron_mixcpt.train.setup import build
from megatron_mixcpt.train.validation import INDEX_CACHE, RunValidation

GROUP_EXTRA_MINUTES = 1.0  # the watchdogs, which write stacks, come before the process group's own timeout


def train(config: Config, *, trust: bool = False) -> None:
    """Train to `config.train.steps`, resuming from the newest checkpoint of the run directory that verifies.

    Args:
        trust: resume even from a checkpoint without a manifest.

    Raises StoppedError (exit code 75) when stopped by a signal, with everything saved; MixcptError when steps keep
    being skipped, a rank is lost, or the last checkpoint cannot be written.
    """
    minutes = config.train.timeout_minutes
    with StopRequest() as stop, explained(stop):
        with parallel_context(
            **config.parallel.sizes, seed=config.train.seed, timeout_minutes=minutes + GROUP_EXTRA_MINUTES
        ) as state:
            with (
                Watchdog(Path(config.run_dir) / "stacks", state.rank, 60.0 * minutes) as watchdog,
                hold(Path(config.run_dir)),
                ExitStack() as stack,
            ):
                _train(config, state, stop, watchdog, stack, trust)


def _train(
    config: Config,
    state: ParallelState,
    stop: StopRequest,
    watchdog: Watchdog,
    stack: ExitStack,
    trust: bool,
) -> None:
    run_dir, settings = Path(config.run_dir), config.train
    components = build(config, state, watchdog.heartbeat)
    watchdog.heartbeat("resuming")
    step, position, guard, forgetting, saved, notes = resume(config, components, trust=trust)
    due = step in (0, settings.steps) or _due(step, config.eval.every)
    due = due or forgetting.due(step, saves=_due(step, config.checkpoint.every))
    validates = due and (saved is None or saved.validated is False)  # what a stop left out is made up
    if step == settings.steps:
        notes += nothing_left(config)
    elif state.rank == 0:  # not before: a run that refuses these settings keeps its own
        changed = record_settings(run_dir, step, config)
        notes += [f"settings from step {step + 1} on: {', '.join(changed)}"] if changed else []
        record_provenance(run_dir / "provenance")
    bookkeeping = stack.enter_context(Bookkeeping(config, state, components, position, guard, forgetting, step, saved))
    for note in notes:
        bookkeeping.message(note)
    watchdog.heartbeat("the dry run")
    dry_run(config, components, state)
    watchdog.heartbeat("opening the data")

    micro_batches = settings.global_batch_size // (settings.micro_batch_size * state.data_size)
    batches = train_batches(
        components.task.train_dataset(settings.seed, run_dir / INDEX_CACHE),
        position,
        components.task.collate,
        micro_batch_size=settings.micro_batch_size,
        data_rank=state.data_rank,
        data_size=state.data_size,
        num_workers=config.data.num_workers,
        device=state.device,
    )
    saver = RunSaver(config, components, bookkeeping, forgetting, step)
    evaluate = RunValidation(config, components, state, bookkeeping, stop, watchdog.heartbeat)

    bookkeeping.start_clock()
    stopping = stop.defer(state.device)
    if not stopping and validates:
        stopping = evaluate(step, saves=step == settings.steps or _due(step, config.checkpoint.every))
    while step < settings.steps and not stopping and not forgetting.exhausted:
        watchdog.heartbeat(f"step {step + 1}")
        bookkeeping.begin_step(step + 1)
        stop.answer = saver.answer(step)
        with section("data"):
            step_batches = [next(batches) for _ in range(micro_batches)]
        components.model.zero_grad_buffer()
        components.optimizer.zero_grad()
        if config.adapter is not None and config.adapter.dropout > 0.0:
            seed_step(state, settings.seed, step)
        sums = components.run(step_batches)
        digest = sum(batch.digest for batch in step_batches) if state.speaks_for_replica else 0
        with section("communication"):
            asked = stop.received is not None
            totals = agree(sums, digest % 2**64, stop=asked, save=saver.is_late, routed=components.run.routed())
        with section("optimizer"):
            admits = partial(guard.admits, forgetting.level(totals))
            grad_norm = optimizer_step(components.optimizer, step, settings, admits, forgetting.rate_factor)
        position.draw(settings.global_batch_size)
        step += 1

        bookkeeping.stepped(step, totals, grad_norm)
        guard.check(step)
        saver.poll()
        last, stopping = step == settings.steps, totals.stopping
        saves = last or _due(step, config.checkpoint.every)
        if not stopping and (last or _due(step, config.eval.every) or forgetting.due(step, saves=saves)):
            stopping = evaluate(step, saves=saves)
        last = last or forgetting.exhausted
        if stopping or last or saves or totals.saving or forgetting.wants_saved(step):
            watchdog.heartbeat(f"saving step {step}")
            saver.save(step, last=stopping or last)
    watchdog.heartbeat("the end of the run")
    if stopping or (step < settings.steps and not forgetting.exhausted):
        if step == 0:
            raise stopped_early()
        raise StoppedError(
            f"stopped at step {step} of {settings.steps} as asked, and saved: run the same command to go on"
        )
    conclude(config, components, bookkeeping, forgetting, evaluate)
    bookkeeping.message(f"finished: {step} of {settings.steps} steps")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
