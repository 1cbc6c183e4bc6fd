"""What a run directory says of the run that is asked for: that it goes on, that it is at its end, or that it cannot.

Read from small files alone, before the libraries that train are imported.
"""

from __future__ import annotations

from pathlib import Path

from megatron_mixcpt.checkpoint.info import CheckpointInfo, TrainingState, read_info
from megatron_mixcpt.checkpoint.manifest import find_damage
from megatron_mixcpt.checkpoint.store import list_checkpoints, result_of
from megatron_mixcpt.config import AdapterConfig, Config
from megatron_mixcpt.config.history import changes, flat, read_history
from megatron_mixcpt.data_prep.mix import Mix
from megatron_mixcpt.errors import ConfigError, VerificationError


def check_run_dir(config: Config, mix: Mix) -> None:
    """Raise ConfigError where the newest checkpoint of the run directory belongs to other settings; names the key.

    A checkpoint that cannot be read is left to `resume.resume`.
    """
    newest = _newest(config)
    if newest is not None:
        check_continuation(*newest, config, mix)


def check_continuation(checkpoint: Path, info: CheckpointInfo, config: Config, mix: Mix) -> TrainingState:
    """What a checkpoint says of its run. Raises ConfigError where its settings were others that have to stay."""
    training = info.training
    if training is None:
        raise ConfigError(f"{checkpoint} holds no position in the data: it was not written by `mixcpt train`")
    if training.kind not in (None, config.kind):
        raise ConfigError(
            f"{checkpoint} is of another kind of training ({training.kind}, this is {config.kind}): set another "
            f"run_dir; to start from it, model.checkpoint={config.run_dir}"
        )
    trained = info.adapter
    if (trained and trained.shape) != (config.adapter and config.adapter.shape):
        raise ConfigError(f"{checkpoint} was trained with {_named(trained)}, not {_named(config.adapter)}: set it back")
    if training.tokenizer_hash != mix.tokenizer_hash:
        raise ConfigError(
            f"{checkpoint} was trained on data of another tokenizer than {mix.path}: restore that data.mix, or "
            "set another run_dir"
        )
    if info.step > config.train.steps:
        raise ConfigError(
            f"{checkpoint} has {info.step} steps behind it, train.steps is {config.train.steps}: raise it, or set "
            "another run_dir"
        )
    if training.seq_length != mix.seq_length:
        raise ConfigError(
            f"{checkpoint} was trained on sequences of {training.seq_length} tokens, {mix.path} now holds "
            f"sequences of {mix.seq_length}: preprocess again with seq_length: {training.seq_length}, or set "
            "another run_dir"
        )
    if (training.router, config.train.router) == ("frozen", "trained"):
        raise ConfigError(
            f"{checkpoint} was trained with train.router=frozen and holds no optimizer state of routers: set it back, "
            f"or another run_dir; to start from it, model.checkpoint={config.run_dir}"
        )
    same = (
        ("train.dtype", training.dtype, config.train.dtype),
        ("train.global_batch_size", training.global_batch_size, config.train.global_batch_size),
    )
    for key, before, now in same:
        if before != now:
            raise ConfigError(f"{checkpoint} was trained with {key}={before}, not {now}: set it back")
    return training


def finished(config: Config) -> bool:
    """Whether the run was brought to its last step, so that nothing is left to do, whatever else is set.

    One process, before any rank starts; where anything is in doubt, resuming decides.
    """
    newest = _newest(config)
    if newest is None:
        return False
    checkpoint, info = newest
    if config.forget is not None and (nothing_left(config) or result_of(checkpoint.parent) is None):
        return False
    whole = info.training is not None and info.step == config.train.steps and info.training.validated
    return bool(whole) and not find_damage(checkpoint)


def nothing_left(config: Config) -> list[str]:
    """What the user is told whose run is at its end but was asked to run with other settings: they were not used."""
    entries = read_history(Path(config.run_dir))
    other = changes(entries[-1]["settings"], flat(config.model_dump(mode="json", by_alias=True))) if entries else []
    return [f"the run was at its end: nothing was done with {', '.join(other)}, and its record stays"] if other else []


def ending(config: Config) -> str:
    """What the user is told of a run that is at its end."""
    told = f"finished: {config.train.steps} of {config.train.steps} steps; {following(config)}"
    return "\n".join([*nothing_left(config), told])


def following(config: Config) -> str:
    """What to look at after a run, and the command to go on."""
    keep = " --adapter" if config.adapter is not None and config.adapter.method == "alora" else ""
    return f"curves in {config.run_dir}/report.html; next: mixcpt export {config.run_dir} --out DIR{keep}"


def _newest(config: Config) -> tuple[Path, CheckpointInfo] | None:
    """The newest checkpoint of the run directory, where there is one that says what it is."""
    for checkpoint in list_checkpoints(Path(config.run_dir) / "checkpoints")[:1]:
        try:
            return checkpoint, read_info(checkpoint)
        except VerificationError:
            break
    return None


def _named(adapter: AdapterConfig | None) -> str:
    return "adapter " + ", ".join(f"{key}={value}" for key, value in adapter.shape.items()) if adapter else "no adapter"
