"""A chain of commands, each a job that starts when the one before has ended well."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from megatron_mixcpt.cli import COMMANDS
from megatron_mixcpt.config import Positive, Section, load_config, validate
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.slurm.check import check_command
from megatron_mixcpt.slurm.jobs import command_jobs, preprocess_jobs, study_job
from megatron_mixcpt.slurm.resources import Resources
from megatron_mixcpt.slurm.submit import Job
from megatron_mixcpt.study.config import Study


class Stage(Resources):
    """One command, and what its job asks for."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Short, and different from the other stages'."""
    command: str
    """A mixcpt command line without `mixcpt`, as `train train.yaml`."""
    array: Positive | None = None
    """For `preprocess` alone: tasks that share the work."""


class Chain(Section):
    """`mixcpt launch CHAIN`."""

    out: str
    """Folder of scripts and logs of the stages that have no run directory."""
    defaults: dict[str, Any] = Field(default={})
    """Keys of all stages that do not set them."""
    stages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    """Stages in their order."""


def describes(path: str) -> str:
    """Whether a YAML file describes a `chain`, a `study` or a `run`."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return "run"  # whose reader explains what is wrong
    keys = content if isinstance(content, dict) else {}
    return "chain" if "stages" in keys else "study" if "arms" in keys else "run"


def chain_jobs(path: str, options: dict[str, Any]) -> list[Job]:
    """The jobs of a chain in their order. `options`: laid over the chain's defaults.

    Raises ConfigError naming the stage and key.
    """
    chain = load_config(Chain, path)
    jobs: list[Job] = []
    names: set[str] = set()
    written: list[Path] = []
    for index, values in enumerate(chain.stages):
        origin = f"{path}: stage {values.get('name', index + 1)}"
        stage = validate(Stage, _over(_over(chain.defaults, options), values), origin)
        words = shlex.split(stage.command)
        if not words or words[0] not in COMMANDS:
            raise ConfigError(f"{origin}: {stage.command!r} is no mixcpt command; these are: {', '.join(COMMANDS)}")
        if stage.name in names:
            raise ConfigError(f"{origin}: there are two stages of this name")
        names.add(stage.name)
        try:
            written += check_command(words, stage.world_size, written)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
        if words[0] == "study":
            if stage.array is not None or any(word.startswith("-") for word in words):
                raise ConfigError(
                    f"{origin}: `study STUDY [key=value ...]`: the stage's ranks say how many runs at a time"
                )
            jobs.append(study_job(load_config(Study, words[1], words[2:]), words, stage, stage.name))
        elif stage.array is None:
            jobs += command_jobs(stage.name, words, stage, Path(chain.out))
        elif words[0] == "preprocess" and len(words) == 2:
            jobs += preprocess_jobs(stage.name, words[1], stage.array, stage, Path(chain.out))
        else:
            raise ConfigError(f"{origin}: array is for `preprocess CONFIG` alone")
    return jobs


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`; of `options`, each of them."""
    options = below.get("options"), above.get("options")
    both = {"options": options[0] | options[1]} if isinstance(options[0], dict) and isinstance(options[1], dict) else {}
    return below | above | both
