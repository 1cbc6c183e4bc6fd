"""What a stage would refuse is refused before anything waits in a queue, though what it works on may not exist yet."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from megatron_mixcpt.cli import parse
from megatron_mixcpt.config import Config, load_config
from megatron_mixcpt.data_prep.config import PreprocessConfig
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.recall.config import RecallConfig
from megatron_mixcpt.runtime.parallel import check_grid
from megatron_mixcpt.select.config import SelectConfig
from megatron_mixcpt.train.setup import check_batch

# Configurations of the commands that share their work among ranks.
SCHEMAS: dict[str, type[Config] | type[SelectConfig]] = {
    "train": Config,
    "align": Config,
    "select": SelectConfig,
    "cache-teacher": Config,
}
ANY_RANKS = ("certify", "rehearse")  # commands in one process that take the configuration of a run on many


def check_command(words: list[str], world_size: int, written: list[Path]) -> list[Path]:
    """Raise ConfigError for arguments, a configuration, or a grid and batch that the command would refuse whatever the
    stages before it make.

    Args:
        words: the command and its arguments.
        world_size: ranks of its job.
        written: folders that stages before it write.

    Returns the folders that it writes itself (`--out`).
    """
    args = _arguments(words)
    if words[0] == "preprocess":
        load_config(PreprocessConfig, args.config, literal=True)
    elif words[0] == "recall":
        return [Path(load_config(RecallConfig, args.config, args.overrides).out).resolve()]
    elif words[0] in ANY_RANKS:
        load_config(Config, args.config, args.overrides)
    elif words[0] in SCHEMAS:
        config = load_config(SCHEMAS[words[0]], args.config, args.overrides)
        grid = config.parallel
        check_grid(world_size, grid.tensor, grid.pipeline, grid.context, grid.expert)
        if isinstance(config, Config) and words[0] != "cache-teacher":
            config.check_command(words[0], args.config)
            check_batch(config, world_size)
        if config.model.hf is not None and not _within(Path(config.model.hf), written):
            arch = architecture_from_hf(config.model.hf)
            arch.check_layout(grid.tensor, grid.pipeline, grid.interleave, grid.expert)
    return [Path(args.out).resolve()] if getattr(args, "out", None) else []


def _arguments(words: list[str]) -> argparse.Namespace:
    """What the command's own parser reads. Raises ConfigError with its complaint."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(words)
    except SystemExit:
        raise ConfigError(said.getvalue().strip().splitlines()[-1]) from None


def _within(path: Path, folders: list[Path]) -> bool:
    path = path.resolve()
    return any(folder in (path, *path.parents) for folder in folders)
