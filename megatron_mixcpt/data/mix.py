"""The mixture of `data.mix` as the trainer takes it. `mix.json` itself is read in data_prep.mix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_mixcpt.data_prep.mix import Mix, Source, Split, read_mix
from megatron_mixcpt.errors import ConfigError, MixcptError

__all__ = ["Mix", "Source", "Split", "open_mix", "read_mix", "reweighted"]


def open_mix(path: str | Path, seq_length: int | None = None) -> Mix:
    """The mixture of `data.mix`, given by its file or its folder, with its data files there.

    Raises:
        ConfigError: it cannot be trained on: there is none, it lacks a data file, or it was packed for another sequence
            length than `seq_length`.
        VerificationError: it is damaged or was edited by hand.
    """
    try:
        mix = read_mix(path)
    except MixcptError as error:
        raise type(error)(f"data.mix: {error}") from None
    if seq_length not in (None, mix.seq_length):
        raise ConfigError(
            f"data.seq_length is {seq_length}, but {mix.path} was packed for {mix.seq_length}: "
            f"set data.seq_length={mix.seq_length} or preprocess again with seq_length: {seq_length}"
        )
    for _, _, split in mix.prefixes:
        for suffix in (".bin", ".idx", ".flags.bin", ".flags.idx"):
            if not Path(f"{split.prefix}{suffix}").is_file():
                raise ConfigError(f"data.mix: {mix.path}: {split.prefix}{suffix} is missing; preprocess again")
    if not mix.train_sources:
        raise ConfigError(f"data.mix: {mix.path}: no source has training data and a weight above 0")
    return mix


def reweighted(mix: Mix, weights: dict[str, float]) -> Mix:
    """The mixture with `data.weights` in place of its own; all training sources must be named, 0 leaves one out.

    Raises ConfigError.
    """
    if not weights:
        return mix
    names = [source.name for source in mix.train_sources]
    if set(weights) != set(names):
        raise ConfigError(
            f"data.weights names {', '.join(weights)}; {mix.path} has {', '.join(names)}: name each of them, 0 leaves "
            "one out"
        )
    sources = tuple(
        replace(source, weight=weights.get(source.name, source.weight))
        for source in mix.sources
        if weights.get(source.name) != 0
    )
    mix = replace(mix, sources=sources)
    if not mix.train_sources:
        raise ConfigError("data.weights: all are 0, so there is nothing to train on")
    return mix
