"""Going on from the newest good checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

from megatron_mixcpt.checkpoint import CheckpointInfo, TrainingState, load_checkpoint, newest_good, read_info
from megatron_mixcpt.checkpoint.manifest import find_damage
from megatron_mixcpt.checkpoint.store import list_checkpoints, result_of
from megatron_mixcpt.config import AdapterConfig, Config, rendered
from megatron_mixcpt.config.history import changes, flat, read_history
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.train.forgetting import Forgetting
from megatron_mixcpt.train.guard import StepGuard
from megatron_mixcpt.train.schedule import learning_rate
from megatron_mixcpt.train.setup import Components


def resume(
    config: Config, components: Components, *, trust: bool
) -> tuple[int, Position, StepGuard, Forgetting, TrainingState | None, list[str]]:
    """Load what the run directory holds, or start. Collective.

    Returns:
        steps done, position in the data, guard, budget, what the checkpoint says of its run, and what the user should
        know.

    Raises:
        VerificationError: there are checkpoints, but none verifies.
        ConfigError: the checkpoint belongs to other settings; names the key.
    """
    notes: list[str] = []
    checkpoint = newest_good(Path(config.run_dir) / "checkpoints", trust=trust, tell=notes.append)
    seed = config.train.seed
    if checkpoint is None:
        begun = Forgetting(config, components.mix, components.task.objective, None)
        return 0, Position.start(components.mix, seed), StepGuard(config.train), begun, None, notes
    info = read_info(checkpoint)
    training = _checked(checkpoint, info, config, components)
    position, changes = Position.resume(training.data, components.mix, seed)
    guard = StepGuard(config.train, training.guard)
    forgetting = Forgetting(config, components.mix, components.task.objective, training)
    if changes:
        guard.forget()
        forgetting.mixture_changed()
        notes.append(f"mixture changed at step {info.step}: " + ", ".join(changes))
    before, now = training.steps, config.train.steps
    if before not in (None, now) and config.train.schedule != "constant":
        notes.append(
            f"train.steps {before} -> {now}: the schedule is laid over {now} steps, so the learning rate goes on at "
            f"{learning_rate(info.step, config.train):.1e}"
        )
    load_checkpoint(checkpoint, components.model, components.optimizer)
    notes.append(f"resumed from {checkpoint}")
    return info.step, position, guard, forgetting, training, notes


def finished(config: Config) -> bool:
    """Whether the run was brought to its last step with these very settings, so that nothing is left to do.

    One process, before any rank starts; where anything is in doubt, resuming decides.
    """
    run_dir = Path(config.run_dir)
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    try:
        same = (run_dir / "config.yaml").read_text() == rendered(config)
        info = read_info(checkpoints[0]) if checkpoints and same else None
    except (OSError, VerificationError):
        return False
    if info is None or info.training is None:
        return False
    if config.forget is not None and result_of(run_dir / "checkpoints") is None:
        return False
    whole = info.step == config.train.steps and info.training.validated
    return bool(whole) and not find_damage(checkpoints[0])


def nothing_left(config: Config) -> list[str]:
    """What the user is told whose run is at its end but was asked to run with other settings: they were not used."""
    entries = read_history(Path(config.run_dir))
    other = changes(entries[-1]["settings"], flat(config.model_dump(mode="json", by_alias=True))) if entries else []
    return [f"the run was at its end: nothing was done with {', '.join(other)}, and its record stays"] if other else []


def ending(config: Config) -> str:
    """What the user is told of a run that is at its end."""
    return f"finished: {config.train.steps} of {config.train.steps} steps; {following(config)}"


def following(config: Config) -> str:
    """What to look at after a run, and the command to go on."""
    keep = " --adapter" if config.adapter is not None and config.adapter.method == "alora" else ""
    return f"curves in {config.run_dir}/report.html; next: mixcpt export {config.run_dir} --out DIR{keep}"


def _checked(checkpoint: Path, info: CheckpointInfo, config: Config, components: Components) -> TrainingState:
    """What a checkpoint says of its run. Raises ConfigError where that was another one."""
    training = info.training
    if training is None:
        raise ConfigError(f"{checkpoint} holds no position in the data: it was not written by `mixcpt train`")
    if training.kind not in (None, config.kind):
        raise ConfigError(
            f"{checkpoint} is of another kind of training ({training.kind}, this is {config.kind}): set another "
            f"run_dir; to start from it, model.checkpoint={config.run_dir}"
        )
    if info.architecture != components.arch:
        raise ConfigError(f"{checkpoint} holds another model than `model` describes: set it back, or another run_dir")
    trained = info.adapter
    if (trained and trained.shape) != (config.adapter and config.adapter.shape):
        raise ConfigError(f"{checkpoint} was trained with {_named(trained)}, not {_named(config.adapter)}: set it back")
    if training.tokenizer_hash != components.mix.tokenizer_hash:
        raise ConfigError(
            f"{checkpoint} was trained on data of another tokenizer than {components.mix.path}: restore that data.mix, "
            "or set another run_dir"
        )
    start = training.start or components.start
    if components.start.weights != start.weights:
        raise ConfigError(
            f"{checkpoint} was trained from other weights than {config.model.source} holds now, and so with another "
            "teacher: put those back (of a run, name the folder of the checkpoint, step_...), or set another run_dir"
        )
    if components.start.adapter != start.adapter:
        raise ConfigError(
            f"{checkpoint} was trained from another adapter than adapter.init holds now: put that back, or set another "
            "run_dir"
        )
    if info.step > config.train.steps:
        raise ConfigError(
            f"{checkpoint} has {info.step} steps behind it, train.steps is {config.train.steps}: raise it, or set "
            "another run_dir"
        )
    if training.seq_length != components.mix.seq_length:
        raise ConfigError(
            f"{checkpoint} was trained on sequences of {training.seq_length} tokens, {components.mix.path} now holds "
            f"sequences of {components.mix.seq_length}: preprocess again with seq_length: {training.seq_length}, or "
            "set another run_dir"
        )
    same = (
        ("train.dtype", training.dtype, config.train.dtype),
        ("train.global_batch_size", training.global_batch_size, config.train.global_batch_size),
    )
    for key, before, now in same:
        if before != now:
            raise ConfigError(f"{checkpoint} was trained with {key}={before}, not {now}: set it back")
    return training


def _named(adapter: AdapterConfig | None) -> str:
    return "adapter " + ", ".join(f"{key}={value}" for key, value in adapter.shape.items()) if adapter else "no adapter"
