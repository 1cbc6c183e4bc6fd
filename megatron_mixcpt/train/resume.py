"""Going on from the newest good checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

from megatron_mixcpt.checkpoint import CheckpointInfo, TrainingState, load_checkpoint, newest_good, read_info
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.train.ended import check_continuation
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


def _checked(checkpoint: Path, info: CheckpointInfo, config: Config, components: Components) -> TrainingState:
    """What a checkpoint says of its run. Raises ConfigError where that was another one."""
    training = check_continuation(checkpoint, info, config, components.mix)
    if info.architecture != components.arch:
        raise ConfigError(f"{checkpoint} holds another model than `model` describes: set it back, or another run_dir")
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
    return training
