"""`mix.json`: the sources of a mixture, as `mixcpt preprocess` wrote them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mixcpt.errors import ConfigError

FORMATS = ("mixcpt-mix/1", "mixcpt-mix/2")


@dataclass(frozen=True)
class Split:
    """One indexed dataset: `prefix`.bin/.idx and `prefix`.flags.bin/.idx."""

    prefix: Path
    sequences: int
    tokens: int
    content: str
    """Hash of the tokens."""


@dataclass(frozen=True)
class Source:
    name: str
    kind: str
    weight: float
    """Share of the tokens, padding left out; over the training sources of a mixture in any common unit."""
    train: Split | None
    valid: Split | None
    pairs: tuple[Split | None, Split | None] = (None, None)
    """Preference pairs for training and validation: two sequences a pair, chosen and rejected."""


@dataclass(frozen=True)
class Mix:
    path: Path
    seq_length: int
    fingerprint: str
    vocab_size: int
    tokenizer_hash: str
    tokenizer_dir: Path
    sources: tuple[Source, ...]

    @property
    def train_sources(self) -> list[Source]:
        """The sources that training draws from, in the order in which statistics are kept."""
        return [source for source in self.sources if source.train]

    def sample_shares(self) -> list[float]:
        """Share of the samples of each training source, summing to 1: sequences with much padding must come oftener."""
        rates = [
            source.weight * source.train.sequences / source.train.tokens
            for source in self.train_sources
            if source.train
        ]
        return [rate / sum(rates) for rate in rates]


def read_mix(path: str | Path, seq_length: int | None = None) -> Mix:
    """Read and check a mixture, given by its file or its folder.

    Raises ConfigError where the file is missing, of another format or version, lacks a data file, or was packed for
    another sequence length than `seq_length`.
    """
    path = Path(path)
    path = path / "mix.json" if path.is_dir() else path
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"data.mix: {path}: no such file; `mixcpt preprocess` writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.mix: {path}: not valid JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"data.mix: {path}: cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"data.mix: {path}: not a mixture: `mixcpt preprocess` writes one")
    if content.get("format") not in FORMATS:
        raise ConfigError(
            f"data.mix: {path}: format {content.get('format')!r}, this version reads {' and '.join(FORMATS)}"
        )
    if seq_length is not None and seq_length != content.get("seq_length", seq_length):
        raise ConfigError(
            f"data.seq_length is {seq_length}, but {path} was packed for {content['seq_length']}: "
            f"set data.seq_length={content['seq_length']} or preprocess again with seq_length: {seq_length}"
        )
    try:
        tokenizer = content["tokenizer"]
        sources = tuple(_read_source(path, entry) for entry in content["sources"])
        mix = Mix(
            path=path,
            seq_length=int(content["seq_length"]),
            fingerprint=content["fingerprint"],
            vocab_size=int(tokenizer["vocab_size"]),
            tokenizer_hash=tokenizer["hash"],
            tokenizer_dir=path.parent / tokenizer["path"],
            sources=tuple(source for source in sources if source.weight > 0),
        )
    except KeyError as error:
        raise ConfigError(f"data.mix: {path}: key {error} is missing; preprocess again") from None
    if not any(source.train for source in mix.sources):
        raise ConfigError(f"data.mix: {path}: no source has training data and a weight above 0")
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
    sources = tuple(replace(source, weight=weights.get(source.name, source.weight)) for source in mix.sources)
    mix = replace(mix, sources=tuple(source for source in sources if source.weight > 0))
    if not mix.train_sources:
        raise ConfigError("data.weights: all are 0, so there is nothing to train on")
    return mix


def _read_source(path: Path, entry: dict[str, Any]) -> Source:
    def split(content: dict[str, Any] | None) -> Split | None:
        if content is None or content["sequences"] == 0:
            return None
        prefix = path.parent / content["prefix"]
        for suffix in (".bin", ".idx", ".flags.bin", ".flags.idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise ConfigError(f"data.mix: {path}: {prefix}{suffix} is missing; preprocess again")
        return Split(prefix, int(content["sequences"]), int(content["tokens"]), content["hash"])

    pairs = entry.get("pairs") or {}
    return Source(
        entry["name"],
        entry["kind"],
        float(entry["weight"]),
        split(entry.get("train")),
        split(entry.get("valid")),
        (split(pairs.get("train")), split(pairs.get("valid"))),
    )
