"""What can be told of a run before the libraries that train are imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.mix import Mix, open_mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import check_directory


def check_early(config: Config, nproc: int) -> Mix:
    """The mixture, where nothing that the configuration names is missing.

    Raises ConfigError (or what `open_mix` raises), naming the key. Whether what is there fits together,
    `train.setup.check` tells.
    """
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc}: at least 1")
    mix = open_mix(config.data.mix, config.data.seq_length)
    if config.model.hf is not None:
        try:
            check_directory(config.model.hf)
        except ConfigError as error:
            raise ConfigError(f"model.hf: {error}") from None
    if config.model.checkpoint is not None and not Path(config.model.checkpoint).is_dir():
        raise ConfigError(
            f"model.checkpoint: {config.model.checkpoint}: no such directory; `mixcpt train` and `mixcpt align` write "
            "runs, `mixcpt convert` makes a checkpoint of a Hugging Face model"
        )
    return mix
