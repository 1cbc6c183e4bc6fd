"""The runs of a study, each in a folder of its own.

Its name says what it is and ends with a hash of its settings, as far as they are not the defaults, so that a run with
other settings is never taken for this one:

    OUT/studies/HASH.yaml                 the study as it runs
    OUT/base/measured-HASH.json           the model that all runs start from
    OUT/cells/ARM-lr1e-05-seed1-HASH/
        train.yaml                        of `mixcpt train` (or align)
        run/                              its run directory
        measured-HASH.json                the run and its averages with the base, by alpha
        failed.json                       why it could not be made
        log.txt
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import xxhash
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from megatron_mixcpt.checkpoint.manifest import MANIFEST
from megatron_mixcpt.checkpoint.origin import find_origin
from megatron_mixcpt.config import Config, load_config, save_config
from megatron_mixcpt.config.history import flat
from megatron_mixcpt.config.reader import Document, read_document, rendered, validate_document
from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.harness import data_files
from megatron_mixcpt.evaluate.measure import EvalSettings
from megatron_mixcpt.huggingface.weights import weights_fingerprint
from megatron_mixcpt.study.config import RATES, Study
from megatron_mixcpt.study.outcome import Outcome, outcome

BASE = "base"
TRAIN_FILE = "train.yaml"
WITHOUT_EFFECT = ("run_dir", "wandb", "checkpoint")  # on what a run learns


@dataclass(frozen=True)
class Cell:
    """One run: an arm at a learning rate with a seed."""

    arm: str
    lr: float
    seed: int
    config: Config
    folder: Path

    def __str__(self) -> str:
        return f"{self.arm}, lr {self.lr:g}, seed {self.seed}"

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def is_averaged(self) -> bool:
        """Whether the run's weights have an average with the base's: an ALoRA adapter stays beside them."""
        return self.config.adapter is None or self.config.adapter.method != "alora"

    def write(self) -> Path:
        """Write the training file; returns its path."""
        path = self.folder / TRAIN_FILE
        save_config(self.config, path)
        return path

    def remove_weights(self) -> None:
        """The run's checkpoints, and the average that a forgetting budget may have made."""
        for name in ("checkpoints", "average"):
            shutil.rmtree(self.run_dir / name, ignore_errors=True)


class Cells:
    """All runs that a study may make, and where their measurements are.

    Args:
        where: the study's file, for errors.

    Raises ConfigError naming the arm where its settings are wrong.
    """

    def __init__(self, study: Study, where: str) -> None:
        self.study = study
        self._where = where
        self._file = read_document(study.base)
        self._made: dict[tuple[str, float, int], Cell] = {}
        own = validate_document(Config, self._file)
        source = own.model.hf or own.model.checkpoint
        if source is None:
            raise ConfigError(
                f"{study.base}: model.preset: a study compares with the model that its runs start from: set model.hf"
            )
        self.base = Path(source)
        self.mix_path = Path(study.measure.mix or own.data.mix)
        for arm in study.arms:
            for rate in study.rates(arm):
                if self.cell(arm, rate, study.seeds[0]).config.model != own.model:
                    raise ConfigError(f"{where}: arms.{arm}: model: all arms start from the same weights")

    @property
    def out(self) -> Path:
        return Path(self.study.out)

    def write(self) -> Path:
        """Write the study as it is, for the processes that measure; returns the file's path. Workers may do so at
        once, and one that comes with another version changes nothing under them."""
        content = rendered(self.study)
        path = self.out / "studies" / f"{_hash(content)}.yaml"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                file.write(content)
            os.replace(file.name, path)
        return path

    def cell(self, arm: str, lr: float, seed: int) -> Cell:
        """The run of an arm. Raises ConfigError."""
        if (arm, lr, seed) not in self._made:
            self._made[arm, lr, seed] = self._make(arm, lr, seed)
        return self._made[arm, lr, seed]

    def _make(self, arm: str, lr: float, seed: int) -> Cell:
        own = {key: value for key, value in self.study.arms[arm].items() if key != RATES}
        laid = {**own, "train.lr": lr, "train.seed": seed, "run_dir": "run"}
        try:
            values = OmegaConf.create(self._file.values)
            for key, value in laid.items():
                OmegaConf.update(values, key, value, merge=True, force_add=True)
            plain: Any = OmegaConf.to_container(values)
            config = validate_document(Config, Document(self._file.name, plain, self._file.lines))
            mix = open_mix(config.data.mix, config.data.seq_length)
        except (OmegaConfBaseException, ConfigError) as error:
            raise ConfigError(f"{self._where}: arms.{arm}: {error}") from None
        told = {key: value for key, value in _own(config).items() if key not in WITHOUT_EFFECT}
        if config.forget and config.checkpoint.every:
            told["checkpoint"] = config.checkpoint.every  # its checkpoints are what a result is chosen from
        name = f"{arm}-lr{lr:g}-seed{seed}-{_hash([told, mix.fingerprint, *_weights(config)])}"
        folder = self.out / "cells" / name
        _refuse_other_defaults(folder / TRAIN_FILE, config)
        wandb = config.wandb.model_copy(update={"name": config.wandb.name or name})
        return Cell(arm, lr, seed, config.model_copy(update={"run_dir": str(folder / "run"), "wandb": wandb}), folder)

    def sweep(self, arm: str) -> list[Cell]:
        """First stage: every learning rate with the first seed."""
        return [self.cell(arm, rate, self.study.seeds[0]) for rate in self.study.rates(arm)]

    def repeats(self, arm: str, lr: float) -> list[Cell]:
        """Second stage: the other seeds at the chosen learning rate."""
        return [self.cell(arm, lr, seed) for seed in self.study.seeds[1:]]

    @property
    def num_runs(self) -> int:
        """In all."""
        return sum(len(self.study.rates(arm)) + len(self.study.seeds) - 1 for arm in self.study.arms)

    @property
    def settings(self) -> EvalSettings:
        """What is measured."""
        return EvalSettings(self.mix_path, **self.study.measure.model_dump(exclude={"mix"}))

    @cached_property
    def file_name(self) -> str:
        """Of measurements: it changes with what is measured."""
        how = self.study.measure.model_dump(mode="json", exclude={"micro_batch_size"})
        asked = [Path(name) for name in [*how["tasks"], how["gci"] or ""] if Path(name).is_file()]
        asked += [file for name in how["tasks"] if name != "bundled" for file in data_files(name)]
        texts = [path.read_text() for path in asked]
        start = _weights(self.sweep(next(iter(self.study.arms)))[0].config)
        return f"measured-{_hash([how, open_mix(self.mix_path).fingerprint, *start, texts])}.json"

    @property
    def base_file(self) -> Path:
        return self.out / BASE / self.file_name

    @property
    def base_measured(self) -> dict[str, Any]:
        """The base model's measurements; empty before they are made."""
        return _read(self.base_file).get("1", {})

    def measured_file(self, cell: Cell) -> Path:
        return cell.folder / self.file_name

    def measured(self, cell: Cell) -> dict[str, Any]:
        """Measurements by alpha, of the run itself at 1, as far as there are any."""
        return _read(self.measured_file(cell))

    def outcomes(self, cell: Cell) -> dict[float, Outcome]:
        """What the run and its averages learned and forgot, by alpha; empty before the base is measured."""
        measured, base = _version(self.measured_file(cell)), _version(self.base_file)
        return _outcomes(measured, base) if measured and base else {}

    def missing(self, cell: Cell) -> list[float]:
        """Alphas that are still to be measured, the run itself first."""
        alphas = [1.0, *self.study.average * cell.is_averaged]
        known = self.measured(cell)
        return [alpha for alpha in alphas if f"{alpha:g}" not in known]

    def named(self, name: str) -> Cell:
        """The run whose folder has this name. Raises ConfigError where the study, as it is now, has none."""
        for arm in self.study.arms:
            for rate in self.study.rates(arm):
                for seed in self.study.seeds:
                    if (cell := self.cell(arm, rate, seed)).folder.name == name:
                        return cell
        raise ConfigError(f"{self._where}: no run of it is {name}")


def _own(section: BaseModel) -> dict[str, Any]:
    """Settings that are not the defaults: a key that a later version adds leaves a run what it was."""
    told = {}
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value != field.get_default(call_default_factory=True):
            told[name] = _own(value) if isinstance(value, BaseModel) else plain[name]
    return told


def _refuse_other_defaults(path: Path, config: Config) -> None:
    """Raise ConfigError where a run was made, by another version, with a default that is not today's."""
    if not path.is_file():
        return
    before, now = (flat(of.model_dump(mode="json", by_alias=True)) for of in (load_config(Config, path), config))
    for key, value in now.items():
        if key.split(".")[0] not in WITHOUT_EFFECT and before.get(key, value) != value:
            raise ConfigError(
                f"{path}: {key} was {before[key]}, which was the default, and now is {value}: remove {path.parent} to "
                f"make that run again, or set {key} in the study"
            )


def _weights(config: Config) -> list[str]:
    """Of what a run starts from: what tells these weights from others under the same name."""
    if config.model.hf:
        return [_fingerprint(config.model.hf)]
    if config.model.checkpoint:
        manifest = find_origin(Path(config.model.checkpoint), verify=False).checkpoint / MANIFEST
        return [_hash(manifest.read_text())]
    return []


_fingerprint = cache(weights_fingerprint)


Version = tuple[Path, int, int]
"""A file as it was: path, time of its last change in ns, size in bytes."""


def _version(path: Path) -> Version | None:
    """None where there is no such file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return path, status.st_mtime_ns, status.st_size


def _read(path: Path) -> dict[str, Any]:
    version = _version(path)
    return _parsed(version) if version else {}


@cache
def _parsed(version: Version) -> dict[str, Any]:
    return json.loads(version[0].read_text())


@cache
def _outcomes(measured: Version, base: Version) -> dict[float, Outcome]:
    return {float(alpha): outcome(rows, _parsed(base)["1"]) for alpha, rows in _parsed(measured).items()}


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())[:10]
