"""Which stored sequences a cache answers for: all of them, or those that the first steps of a run draw.

What a run draws follows from `train.seed`, the sources' weights and how many samples are drawn, and from nothing else
(see data/position.py), so these three are what a smaller cache is bound to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.dataset import Mixture
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.files import write_whole

CHOSEN = "chosen.bin"  # in the folder of a source: numbers of its stored sequences, ascending int64, in record order


def draws_identity(config: Config, mix: Mix, steps: int) -> dict[str, Any]:
    """What decides which sequences the first `steps` steps draw."""
    sources = [source.name for source in mix.train_sources]
    return {
        "seed": config.train.seed,
        "weights": dict(zip(sources, mix.sample_shares())),
        "samples": steps * config.train.global_batch_size,
    }


def chosen_counts(mix: Mix, draws: dict[str, Any]) -> dict[str, int]:
    """Number of different sequences drawn of each source, by the hash of its data. None comes twice in an epoch."""
    position = Position.start(mix, draws["seed"])
    position.draw(draws["samples"])
    sources = position.state()["sources"].values()
    return {source["content"]: min(source["drawn"], source["sequences"]) for source in sources}


def write_chosen(cache: Path, mix: Mix, dataset: Mixture, draws: dict[str, Any]) -> None:
    """The list of every source. `dataset`: of the seed that the draws have."""
    chosen: list[set[int]] = [set() for _ in mix.train_sources]
    for draw in Position.start(mix, draws["seed"]).draw(draws["samples"]):
        chosen[draw.source].add(dataset.sequence(draw))
    for source, numbers in zip(mix.train_sources, chosen):
        assert source.train is not None
        write_whole(cache / source.train.content / CHOSEN, np.array(sorted(numbers), "<i8").tobytes())


def read_chosen(cache: Path, identity: dict[str, Any], content: str) -> np.ndarray | None:
    """The sequences that the records of a source are of, int64; None: all, in their order.

    Raises ConfigError where the list is missing or not whole.
    """
    if "draws" not in identity:
        return None
    path, count = cache / content / CHOSEN, identity["sources"][content]["chosen"]
    numbers = np.fromfile(path, "<i8") if path.is_file() else np.empty(0, "<i8")
    if len(numbers) != count or np.any(np.diff(numbers) <= 0):
        raise ConfigError(f"teacher.cache: {path} is missing or damaged: run `mixcpt cache-teacher` again")
    return numbers


def refuse_other_draws(cache: Path, identity: dict[str, Any], config: Config, mix: Mix) -> None:
    """Raise ConfigError, naming what differs, where the run draws other sequences than the cache was made for."""
    if "draws" not in identity:
        return
    has, wanted = identity["draws"], draws_identity(config, mix, config.train.steps)
    reasons = {
        "seed": f"train.seed {has['seed']}, the run has {wanted['seed']}",
        "weights": f"sources weighted {has['weights']}, the run has {wanted['weights']}",
        "samples": f"{has['samples']} samples, the run draws {wanted['samples']}",
    }
    for key, reason in reasons.items():
        if wanted["samples"] > has["samples"] if key == "samples" else has[key] != wanted[key]:
            raise ConfigError(
                f"teacher.cache: {cache} holds only what a run draws with {reason}: run `mixcpt cache-teacher` with "
                "this configuration and an empty teacher.cache; without --steps it serves every run on this data"
            )
