"""Drawn samples on disk: blocks of consecutive numbers, each complete and sealed, or growing.

    .samples/<stream>-<identity>/000012.jsonl    a complete block: hash of the rest, then a sample a line
    .samples/<stream>-<identity>/000012.growing  samples of an unfinished block, appended one by one with their hashes

A block that does not match its seal is drawn again. Any number of processes may write different blocks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megatron_mixcpt.files import writing

FOLDER = ".samples"
Sample = dict[str, Any]


class Store:
    """The samples of one stream: `size` consecutive numbers a block."""

    def __init__(self, out: Path, stream: str, identity: dict[str, Any], size: int) -> None:
        body = orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)
        self.folder = out / FOLDER / f"{stream}-{xxhash.xxh3_128_hexdigest(body)[:16]}"
        self.size = size

    def numbers(self, block: int) -> range:
        """Of the samples of a block."""
        return range(block * self.size, (block + 1) * self.size)

    def blocks(self, amount: int) -> range:
        """Blocks that hold the first `amount` samples. The last is drawn whole: larger amounts then find it so."""
        return range(-(-amount // self.size))

    def is_complete(self, block: int) -> bool:
        """Whether a block is there, byte for byte as it was written."""
        return self._body(block) is not None

    def read(self, block: int) -> list[Sample]:
        """The samples of a complete block in their order. Raises FileNotFoundError where it is not complete."""
        body = self._body(block)
        if body is None:
            raise FileNotFoundError(f"{self._path(block)} is missing or damaged")
        return [orjson.loads(line) for line in body.splitlines()]

    def complete(self, block: int, samples: list[Sample]) -> None:
        """Write a block; it appears under its name when all of it is on disk."""
        body = b"".join(orjson.dumps(sample, option=orjson.OPT_APPEND_NEWLINE) for sample in samples)
        with writing(self._path(block)) as file:
            file.write(_seal(body) + b"\n" + body)
        self._growing(block).unlink(missing_ok=True)

    def growing(self, block: int) -> dict[int, Sample]:
        """Samples of an unfinished block by number; what was cut short at its end is dropped, from the file too."""
        try:
            data = self._growing(block).read_bytes()
        except FileNotFoundError:
            return {}
        there, sound = {}, 0
        for line in data.splitlines(keepends=True):
            seal, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or seal != _seal(body):
                break
            sample = orjson.loads(body)
            there[int(sample["number"])] = sample
            sound += len(line)
        if sound < len(data):
            os.truncate(self._growing(block), sound)
        return there

    def append(self, block: int, sample: Sample) -> None:
        """Add a sample to an unfinished block; it survives a kill from here on."""
        body = orjson.dumps(sample)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._growing(block).open("ab") as file:
            file.write(_seal(body) + b" " + body + b"\n")

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.jsonl"

    def _growing(self, block: int) -> Path:
        return self.folder / f"{block:06d}.growing"

    def _body(self, block: int) -> bytes | None:
        try:
            seal, _, body = self._path(block).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        return body if seal == _seal(body) else None


def _seal(body: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(body).encode()
