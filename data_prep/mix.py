"""`mix.json`: the mixture that the trainer reads, sealed with a fingerprint. Every command reads it here."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.files import write_whole

FORMAT = "mixcpt-mix/2"
READABLE = ("mixcpt-mix/1", FORMAT)  # 1 knows neither the kind general nor sources that are only held out
FILE_NAME = "mix.json"
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Split:
    """One indexed dataset: `prefix`.bin/.idx and `prefix`.flags.bin/.idx."""

    prefix: Path
    sequences: int
    tokens: int
    """Without padding."""
    content: str
    """Hash of tokens, flags and how they are cut."""
    documents: int = 0
    target_tokens: int = 0
    index_hash: str | None = None
    """Of a view: hash of its pointers into the `.bin` that it shares."""


@dataclass(frozen=True)
class SourceShare:
    """What a source asked of the mixture and what came out."""

    of: str
    """What is counted: tokens or targets."""
    requested: dict[str, float]
    """One of weight, tokens, epochs, with its value."""
    share: float
    tokens: int
    epochs: float


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
    layout: str = "pack"
    share: SourceShare | None = None
    """None where the source is only held out, and in excerpts."""

    @property
    def splits(self) -> list[tuple[str, Split]]:
        """All its prefixes: ('train', 'valid', 'pairs/train' or 'pairs/valid', split)."""
        named = [*zip(SPLITS, (self.train, self.valid)), *zip((f"pairs/{name}" for name in SPLITS), self.pairs)]
        return [(name, split) for name, split in named if split is not None]


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer of a mixture; its files lie in `path`."""

    kind: str
    path: Path
    vocab_size: int
    hash: str
    bos_id: int | None
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class Mix:
    path: Path
    seq_length: int
    fingerprint: str
    """Hash of everything in the file but itself; empty until it is written."""
    tokenizer: TokenizerEntry
    sources: tuple[Source, ...]
    seed: int = 0
    view_of: str | None = None
    """Fingerprint of the mixture that this one is a view of."""

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def tokenizer_hash(self) -> str:
        return self.tokenizer.hash

    @property
    def tokenizer_dir(self) -> Path:
        return self.tokenizer.path

    @property
    def train_sources(self) -> list[Source]:
        """The sources that training draws from, in the order in which statistics are kept."""
        return [source for source in self.sources if source.train and source.weight > 0]

    @property
    def prefixes(self) -> list[tuple[Source, str, Split]]:
        """Every prefix the mixture names."""
        return [(source, name, split) for source in self.sources for name, split in source.splits]

    def sample_shares(self) -> list[float]:
        """Share of the samples of each training source, summing to 1: sequences with much padding must come oftener."""
        rates = [
            source.weight * source.train.sequences / source.train.tokens
            for source in self.train_sources
            if source.train
        ]
        return [rate / sum(rates) for rate in rates]


def read_mix(path: str | Path) -> Mix:
    """Read a mixture, given by its file or its folder. Its data files are not looked at.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it is of another format or version.
        VerificationError: it is damaged or was edited by hand.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `mixcpt preprocess` writes it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise VerificationError(f"{path}: not valid JSON: {error}; {_RESTORE}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ConfigError(f"{path}: not a mixture: `mixcpt preprocess` writes one")
    if content["format"] not in READABLE:
        known = " and ".join(READABLE)
        raise ConfigError(f"{path}: format {content['format']!r}, this version reads {known}")
    if content.get("fingerprint") != fingerprint(content):
        raise VerificationError(
            f"{path} does not match its fingerprint: change mixtures with `mixcpt mix`, not by hand; {_RESTORE}"
        )
    try:
        return _from_json(path, content)
    except (KeyError, TypeError) as error:
        raise VerificationError(f"{path}: not as `mixcpt preprocess` writes it ({error}); {_RESTORE}") from None


_RESTORE = "restore it or preprocess again"


def write_mix(path: Path, mix: Mix) -> Mix:
    """Write a mixture, atomically; returns it with its place and its fingerprint. Prefixes are named, not moved."""
    content = {"format": FORMAT, **mix_to_json(mix)}
    seal = fingerprint(content)
    sealed = {"format": FORMAT, "fingerprint": seal, **content}
    write_whole(path, orjson.dumps(sealed, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return replace(mix, path=path, fingerprint=seal)


def fingerprint(content: dict[str, Any]) -> str:
    """xxh3-128 over everything in a mix.json but its fingerprint."""
    body = {key: value for key, value in content.items() if key != "fingerprint"}
    try:
        return xxhash.xxh3_128_hexdigest(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))
    except orjson.JSONEncodeError as error:  # an integer of more than 64 bits
        return f"none: {error}"


def split_to_json(split: Split | None) -> dict[str, Any] | None:
    """The entry of a prefix in mix.json."""
    if split is None:
        return None
    entry: dict[str, Any] = {"prefix": split.prefix.name, "sequences": split.sequences, "documents": split.documents}
    entry |= {"tokens": split.tokens, "target_tokens": split.target_tokens, "hash": split.content}
    return entry if split.index_hash is None else {**entry, "index_hash": split.index_hash}


def split_from_json(folder: Path, entry: dict[str, Any] | None) -> Split | None:
    """The prefix that an entry of mix.json names, in `folder`. Raises KeyError."""
    if entry is None:
        return None
    counts = {key: int(entry[key]) for key in ("sequences", "tokens", "documents", "target_tokens")}
    return Split(folder / entry["prefix"], content=entry["hash"], index_hash=entry.get("index_hash"), **counts)


def mix_to_json(mix: Mix) -> dict[str, Any]:
    """What mix.json holds beside its format and fingerprint."""
    content: dict[str, Any] = {
        "seq_length": mix.seq_length,
        "seed": mix.seed,
        "tokenizer": {**vars(mix.tokenizer), "path": mix.tokenizer.path.name},
        "sources": [_source_to_json(source) for source in mix.sources],
    }
    return content if mix.view_of is None else {**content, "view_of": mix.view_of}


def _source_to_json(source: Source) -> dict[str, Any]:
    entry: dict[str, Any] = {key: getattr(source, key) for key in ("name", "kind", "weight", "layout")}
    entry |= {"train": split_to_json(source.train), "valid": split_to_json(source.valid)}
    if source.kind == "preference":
        entry["pairs"] = dict(zip(SPLITS, map(split_to_json, source.pairs)))
    return entry if source.share is None else {**entry, "share": vars(source.share)}


def _from_json(path: Path, content: dict[str, Any]) -> Mix:
    folder = path.parent
    return Mix(
        path=path,
        seq_length=content["seq_length"],
        fingerprint=content["fingerprint"],
        tokenizer=TokenizerEntry(**{**content["tokenizer"], "path": folder / content["tokenizer"]["path"]}),
        sources=tuple(_source_from_json(folder, entry) for entry in content["sources"]),
        seed=content["seed"],
        view_of=content.get("view_of"),
    )


def _source_from_json(folder: Path, entry: dict[str, Any]) -> Source:
    pairs = entry.get("pairs") or {}
    return Source(
        name=entry["name"],
        kind=entry["kind"],
        weight=float(entry["weight"]),
        train=split_from_json(folder, entry["train"]),
        valid=split_from_json(folder, entry["valid"]),
        pairs=(split_from_json(folder, pairs.get("train")), split_from_json(folder, pairs.get("valid"))),
        layout=entry["layout"],
        share=SourceShare(**entry["share"]) if "share" in entry else None,
    )
