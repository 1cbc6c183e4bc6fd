"""A run directory read back: settings, metrics, checkpoints. Needs no torch, and takes unfinished and broken runs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_mixcpt.checkpoint.info import read_info
from megatron_mixcpt.checkpoint.store import list_checkpoints, size_of, step_of
from megatron_mixcpt.config.history import flat
from megatron_mixcpt.data.position import sources_of
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.errors import ConfigError, MixcptError, VerificationError
from megatron_mixcpt.files import reason


@dataclass(frozen=True)
class Point:
    step: int
    tokens: int
    """Target tokens up to this step."""
    value: float | None
    """None where it was not finite."""


@dataclass(frozen=True)
class SavedCheckpoint:
    step: int
    num_bytes: int
    path: Path
    written: datetime


@dataclass(frozen=True)
class Share:
    """One source of the mixture."""

    requested: float
    """Share of the samples."""
    samples: float
    """Share of the samples that were drawn, up to the newest checkpoint."""


@dataclass
class Run:
    """What one run directory holds."""

    path: Path
    name: str
    settings: dict[str, Any]
    """`section.key` -> value; empty where config.yaml is missing."""
    written: datetime
    """When the newest metric was."""
    checkpoints: list[SavedCheckpoint]
    """Newest first."""
    shares: dict[str, Share]
    """By source; empty before the first checkpoint."""
    kinds: dict[str, str]
    """`domain` or another kind by source; empty where the mixture is not there any more."""
    series: dict[str, list[Point]] = field(default_factory=dict)
    """By metric, in the order of the steps."""
    decisions: list[tuple[int, str]] = field(default_factory=list)
    """Of a forgetting budget: step, and what was decided and why."""

    @property
    def steps(self) -> int:
        """Steps done."""
        points = self.series.get("train/loss")
        return points[-1].step if points else 0

    @property
    def tokens(self) -> int:
        return max((points[-1].tokens for points in self.series.values()), default=0)

    @property
    def aligned_by(self) -> str | None:
        """`sft` or `dpo` of an alignment run."""
        return self.settings.get("align.method")

    def seconds(self) -> float:
        """All that rows account for."""
        parts = sum(sum(self.values(name)) for name in self.series if name.startswith("time/"))
        return parts or sum(self.values("speed/step_seconds"))

    @property
    def total_steps(self) -> int | None:
        return self.settings.get("train.steps")

    def last(self, name: str) -> float | None:
        """Newest finite value of a metric."""
        return next((point.value for point in reversed(self.series.get(name, [])) if point.value is not None), None)

    def first(self, name: str) -> float | None:
        return next((point.value for point in self.series.get(name, []) if point.value is not None), None)

    def values(self, name: str) -> list[float]:
        return [point.value for point in self.series.get(name, []) if point.value is not None]

    def sources(self, prefix: str, suffix: str) -> list[str]:
        """Names without a slash that stand between `prefix` and `suffix` in the metrics, as in val/<source>/loss."""
        names = (name for name in self.series if name.startswith(prefix) and name.endswith(suffix))
        return [name for whole in names if "/" not in (name := whole[len(prefix) : len(whole) - len(suffix)])]


def read_run(path: Path) -> Run:
    """Read a run directory. Raises ConfigError where it is none; what is damaged in it is left out."""
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        known = f"{path} is no run directory" if path.is_dir() else f"{path}: no such directory"
        raise ConfigError(f"{known}: a run has a metrics.jsonl, which `mixcpt train` writes")
    try:
        lines = metrics.read_text(errors="replace").splitlines()
        written = datetime.fromtimestamp(metrics.stat().st_mtime)
    except OSError as error:
        raise ConfigError(f"{metrics} cannot be read: {reason(error)}") from None
    checkpoints = list_checkpoints(path / "checkpoints")
    settings = _settings(path / "config.yaml")
    run = Run(
        path=path,
        name=str(settings.get("wandb.name") or path.absolute().name),
        settings=settings,
        written=written,
        checkpoints=list(_saved(checkpoints)),
        shares=_shares(checkpoints[0]) if checkpoints else {},
        kinds={},
    )
    run.kinds = _kinds(run.settings.get("data.mix"))
    tokens = 0
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
            continue  # the last line of a run that was killed while writing it
        tokens = row.get("train/tokens", tokens)
        for name, value in row.items():
            if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                finite = None if value is None or not math.isfinite(value) else value
                run.series.setdefault(name, []).append(Point(step, tokens, finite))
            elif name == "forget/decision":
                run.decisions.append((step, str(value)))
    return run


def distinct_names(runs: list[Run]) -> None:
    """Name runs that would be called the same by their paths."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)


def differing_settings(runs: list[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, by key; the run directory itself is left out."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys if key not in ("run_dir", "wandb.name")}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row[1:])}


def _saved(checkpoints: Iterable[Path]) -> Iterator[SavedCheckpoint]:
    for folder in checkpoints:
        with contextlib.suppress(FileNotFoundError):  # the run goes on, and has removed it since
            written = datetime.fromtimestamp(folder.stat().st_mtime)
            yield SavedCheckpoint(step_of(folder), size_of(folder), folder, written)


def _settings(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return flat(values) if isinstance(values, dict) else {}


def _kinds(mix: Any) -> dict[str, str]:
    """Of a run's sources; none where its data is not there any more, or is not what it was."""
    try:
        return {source.name: source.kind for source in read_mix(mix).sources} if isinstance(mix, str) else {}
    except MixcptError:
        return {}


def _shares(checkpoint: Path) -> dict[str, Share]:
    try:
        training = read_info(checkpoint).training
    except VerificationError:
        return {}
    sources = sources_of(training.data) if training else []
    total = sum(source.drawn for source in sources) or 1
    return {source.name: Share(source.weight, source.drawn / total) for source in sources}
