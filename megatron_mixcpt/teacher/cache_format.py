"""The files of a teacher cache: what is kept of each sequence, and how it is known to belong to the run that reads it.

    cache.json                       what was computed, of which model and data; when complete, every shard's hash
    <data hash>/<number>.bin, .json  records of `sequences_per_shard` stored sequences in their order, and their hash

    <data hash>/chosen.bin           where the cache is of some sequences alone: their numbers (see cache_choice.py)

A record is one stored sequence. It is addressed by the sequence's number in its source, not by a step, so a cache of
all sequences serves any order of the data, any mixture of its sources and any number of epochs.

Symbols: s tokens a sequence, k tokens kept a position.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_mixcpt.checkpoint.manifest import hash_file
from megatron_mixcpt.errors import ConfigError, MixcptError, VerificationError
from megatron_mixcpt.files import write_json, write_whole

FORMAT = "mixcpt-teacher-cache/2"
READABLE = (FORMAT, "mixcpt-teacher-cache/1")  # which knew no chosen sequences
MANIFEST = "cache.json"
SHARD_BYTES = 64 << 20
STEP = 2.0**-11  # nats between two neighbours of 16 bits, which so reach down to -32: a probability of 1e-14


def record_dtype(seq_length: int, top_k: int, vocab_size: int, bits: int) -> np.dtype:
    """One sequence: `ids` and `logp` of the kept tokens (most likely first), log-probabilities of the label and of all
    other tokens together (the tail), hash of the sequence, and hash of everything before it in the record."""
    ids = "<u2" if vocab_size <= 1 << 16 else "<u4"
    number = "<u2" if bits == 16 else "<f4"
    return np.dtype(
        [
            ("ids", ids, (seq_length, top_k)),
            ("logp", number, (seq_length, top_k)),
            ("gold", number, (seq_length,)),
            ("tail", number, (seq_length,)),
            ("content", "<u8"),
            ("check", "<u8"),
        ]
    )


def quantized(logp: np.ndarray, bits: int) -> np.ndarray:
    """Log-probabilities as they are stored: fp32, or multiples of STEP in 16 bits, -32 and less as -32."""
    if bits == 32:
        return logp.astype("<f4")
    return np.clip(np.rint(-logp.astype(np.float64) / STEP), 0, 0xFFFF).astype("<u2")


def dequantized(stored: np.ndarray) -> np.ndarray:
    """fp32; inverse of `quantized`."""
    return stored if stored.dtype == np.float32 else stored.astype(np.float32) * np.float32(-STEP)


def fill_record(
    record: np.ndarray, ids: np.ndarray, logp: np.ndarray, gold: np.ndarray, tail: np.ndarray, content: int
) -> None:
    """Write a sequence (ids, logp `[s, k]`; gold, tail `[s]`) into `record`, a slice `[1]` of an array of records.

    Raises MixcptError for an answer that is no number, which 16 bits would keep as a certain one.
    """
    if any(np.isnan(part).any() for part in (logp, gold, tail)):
        raise MixcptError(
            "the teacher's answer to a sequence is not a number (NaN): its weights, or its dtype, are bad"
        )
    bits = 8 * record["gold"].dtype.itemsize
    record["ids"], record["logp"] = ids, quantized(logp, bits)
    record["gold"], record["tail"] = quantized(gold, bits), quantized(tail, bits)
    if bits == 16:
        # The first choice stays the first choice, however close the second.
        logp = record["logp"]
        logp[..., 1:] = np.maximum(logp[..., 1:], np.minimum(logp[..., :1], 0xFFFE) + 1)
    record["content"] = content
    record["check"] = _check(record)


def check_record(record: np.ndarray, content: int, where: str) -> None:
    """Raise VerificationError unless the record is as it was written, and of the sequence with this hash."""
    if int(record["check"]) != _check(record):
        raise VerificationError(f"{where} is damaged: remove its shard and run `mixcpt cache-teacher` again")
    if int(record["content"]) != content:
        raise VerificationError(f"{where} is of another sequence: the cache belongs to other data")


def _check(record: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(record.tobytes()[: -record["check"].dtype.itemsize])


@dataclass(frozen=True)
class Shard:
    """Records `begin:end` of the source whose data has the hash `content`."""

    content: str
    number: int
    begin: int
    end: int

    def path(self, cache: Path) -> Path:
        return cache / self.content / f"{self.number:06d}.bin"


def shards_of(identity: dict[str, Any]) -> list[Shard]:
    """All shards of a cache, in order."""
    size = identity["sequences_per_shard"]
    return [
        Shard(content, number, begin, min(begin + size, records))
        for content, source in identity["sources"].items()
        for records in [source.get("chosen", source["sequences"])]
        for number, begin in enumerate(range(0, records, size))
    ]


def write_shard(cache: Path, shard: Shard, records: np.ndarray) -> None:
    """The shard appears under its name when all of it is on disk; after that, beside it, its hash and the mean
    probability of the tail."""
    path = shard.path(cache)
    write_whole(path, records.tobytes())
    tail = float(np.exp(dequantized(records["tail"]).astype(np.float64)).mean())
    write_json(path.with_suffix(".json"), {**hash_file(path), "tail": tail})


def is_written(cache: Path, shard: Shard) -> bool:
    """Whether the shard is there, byte for byte as it was written."""
    path = shard.path(cache)
    try:
        return json.loads(path.with_suffix(".json").read_text()).items() >= hash_file(path).items()
    except (OSError, json.JSONDecodeError, AttributeError):
        return False


def read_manifest(cache: Path) -> dict[str, Any]:
    """`cache.json`: `identity` and, where the cache is complete, `shards`.

    Raises ConfigError where there is none, or it is of another format.
    """
    path = cache / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"teacher.cache: {path}: no such file; `mixcpt cache-teacher` writes it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"teacher.cache: {path}: cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") not in READABLE:
        raise ConfigError(f"teacher.cache: {path}: not a cache of this version ({FORMAT})")
    return manifest
