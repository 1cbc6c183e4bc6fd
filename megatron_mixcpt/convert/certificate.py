"""`certificate.json`: that the trainer computed the right thing, in which settings, on what."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_mixcpt import __version__
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.files import write_whole

FORMAT = "mixcpt-certificate/1"
FILE_NAME = "certificate.json"
LIBRARIES = ("torch", "megatron-core", "transformers")
# What neither changes the arithmetic nor which code runs.
_SIZES: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "data": None,
    "eval": None,
    "forget": ("budget", "on", "every", "average"),  # whether there is one, it says
    "checkpoint": None,
    "wandb": None,
    "run_dir": None,
    "train": (
        *("steps", "lr", "min_lr", "warmup_steps", "decay_fraction", "seed"),
        *("spike_sigmas", "spike_window", "max_skipped", "timeout_minutes", "profile"),
    ),
    "adapter": ("init",),
    "teacher": ("cache", "hf", "nvme_path"),
}


@dataclass(frozen=True)
class Certificate:
    """What `mixcpt certify` found to be right.

    Attributes:
        settings: of the run, those that decide what is computed and how (`settings_of`).
        features: of its model (`features_of`).
        ranks: of the real run.
        grid: tensor, pipeline, context and data of the small run; where experts are spread, expert, over how many of
            these ranks.
        versions: of the program and its libraries.
        measured: of each dtype and kind of thing the largest error with its bound.
        left_out: settings that took no part.
    """

    settings: dict[str, Any]
    features: dict[str, Any]
    ranks: int
    grid: dict[str, int]
    versions: dict[str, str]
    device: str
    measured: list[dict[str, Any]]
    compared: int
    left_out: list[str]

    def write(self, folder: Path) -> Path:
        """Write it into `folder`."""
        path = folder / FILE_NAME
        write_whole(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        return path

    def speaks_for(self, config: Config, arch: Architecture, ranks: int, versions: dict[str, str]) -> bool:
        """Whether a run of `config` on so many ranks with these versions computes what was certified."""
        same = {name: versions.get(name) for name in self.versions}
        fits = self.settings == settings_of(config) and self.features == features_of(arch)
        return fits and self.ranks == ranks and self.versions == same


def read_certificate(folder: Path) -> Certificate | None:
    """The certificate in `folder`, if there is one. Raises VerificationError where it cannot be read."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        return Certificate(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise VerificationError(f"{path}: not as `mixcpt certify` writes it ({error}): remove it") from None


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that decide what is computed and how, without sizes, places and rates."""
    values = json.loads(config.model_dump_json(by_alias=True))
    for section, keys in _SIZES.items():
        if keys is None:
            values.pop(section)
        elif values[section] is not None:
            values[section] = {key: value for key, value in values[section].items() if key not in keys}
    return values


def features_of(arch: Architecture) -> dict[str, Any]:
    """What decides which code a model runs, whatever its size."""
    features: dict[str, Any] = {
        "model_type": arch.model_type,
        "grouped queries": arch.num_query_groups < arch.num_attention_heads,
        "tied embeddings": arch.tie_word_embeddings,
        "biases": arch.qkv_bias,
        "normed queries and keys": arch.qk_norm,
        "rotary scaling": arch.rope_scaling.kind if arch.rope_scaling else "none",
        "sliding window": arch.sliding_window is not None,
    }
    if arch.num_experts:
        features |= {"experts of a token": "one" if arch.experts_per_token == 1 else "several"}
        features |= {"shares add up to 1": arch.normalize_routing, "layers without experts": bool(arch.dense_layers)}
    return features


def current_versions() -> dict[str, str]:
    """Of this program and the libraries that compute."""
    return {"megatron-mixcpt": __version__} | {name: metadata.version(name) for name in LIBRARIES}


def recorded_versions(run_dir: Path) -> dict[str, str]:
    """Those of a run's last start; empty where it kept no record."""
    starts = sorted((run_dir / "provenance").glob("start_*.json"))
    if not starts:
        return {}
    record = json.loads(starts[-1].read_text())
    found = dict(package.split("==", 1) for package in record["packages"] if "==" in package)
    return {name: found.get(name, "") for name in LIBRARIES} | {"megatron-mixcpt": record["code"]["version"]}
