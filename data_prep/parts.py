"""Part files: what a worker leaves behind for one chunk, and the receipt that vouches for it.

A chunk yields one or more blocks `00012-000.part`, each tokens, flags and a document table in one file, and a receipt
`00012.json`, written last and atomically. Without a receipt, or if a block does not match it, the chunk is done again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import xxhash

from megatron_mixcpt.data_prep.format import write_hashed
from megatron_mixcpt.files import writing

# One row per document. `hash` is the 128-bit content hash of its record (two halves); `kind` as in the flags.
DOCUMENT_DTYPE = np.dtype(
    [
        ("hash_high", "<u8"),
        ("hash_low", "<u8"),
        ("line", "<u8"),
        ("file", "<u4"),
        ("tokens", "<u4"),
        ("targets", "<u4"),
        ("kind", "u1"),
        ("contaminated", "u1"),
    ]
)
ALIGNMENT = 64
TOO_LONG = "too long"  # reason of a conversation that does not fit into seq_length: not bad, and counted apart


@dataclass(frozen=True)
class Unusable:
    """A record that was left out: file of the plan, line, and why."""

    file: int
    line: int
    reason: str
    detail: str

    @property
    def is_too_long(self) -> bool:
        """Whether it was left out for its length alone."""
        return self.reason == TOO_LONG


@dataclass(frozen=True)
class BlockEntry:
    """A block as its receipt names it."""

    name: str
    tokens: int
    documents: int
    permutations: int
    """uint32 a document that near-duplicates are found by; 0 where nobody looks for them."""
    hash: str
    """xxh3-128 of the file, hex."""


@dataclass(frozen=True)
class Receipt:
    """What became of a chunk's records."""

    chunk: int
    plan: str
    """Key of the plan that cut the chunk."""
    engine: str
    """Name of the tokenizer's engine."""
    records: int
    literals: int
    """Control strings in text."""
    blocks: list[BlockEntry]
    bad: list[Unusable]


@dataclass(frozen=True)
class Block:
    """The arrays of one block, mapped from its file."""

    tokens: np.ndarray  # token dtype [T]
    flags: np.ndarray  # uint8 [T]
    documents: np.ndarray  # DOCUMENT_DTYPE [D]
    signatures: np.ndarray | None  # uint32 [D, permutations], only where near-duplicates are looked for


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_block(
    folder: Path,
    name: str,
    tokens: np.ndarray,
    flags: np.ndarray,
    documents: np.ndarray,
    signatures: np.ndarray | None = None,
) -> BlockEntry:
    """Write a block atomically; returns its entry in the receipt."""
    state = xxhash.xxh3_128()
    sections = [tokens, flags, documents] + ([] if signatures is None else [signatures])
    with writing(folder / name, durable=False) as file:
        for section in sections:
            write_hashed(file, state, section)
            write_hashed(file, state, np.zeros(_align(section.nbytes) - section.nbytes, dtype=np.uint8))
    permutations = 0 if signatures is None else signatures.shape[1]
    return BlockEntry(name, len(tokens), len(documents), permutations, state.hexdigest())


def _sections(entry: BlockEntry, dtype: np.dtype) -> Iterator[tuple[int, int, np.dtype]]:
    """(byte offset, items, dtype) of each section."""
    offset = 0
    for count, kind in (
        (entry.tokens, dtype),
        (entry.tokens, np.dtype(np.uint8)),
        (entry.documents, DOCUMENT_DTYPE),
        (entry.documents * entry.permutations, np.dtype("<u4")),
    ):
        yield offset, count, kind
        offset += _align(count * kind.itemsize)


def _size(entry: BlockEntry, dtype: np.dtype) -> int:
    offset, count, kind = list(_sections(entry, dtype))[-1]
    return offset + _align(count * kind.itemsize)


def open_block(folder: Path, entry: BlockEntry, dtype: np.dtype) -> Block:
    """Map a block that its receipt describes."""
    import pyarrow

    path = folder / entry.name
    if _size(entry, dtype) == 0:
        raw = np.zeros(0, np.uint8)
    else:
        with pyarrow.memory_map(str(path)) as file:  # unlike mmap it keeps no file open: there may be thousands
            raw = np.frombuffer(file.read_buffer(), np.uint8)
    arrays = [raw[at : at + count * kind.itemsize].view(kind) for at, count, kind in _sections(entry, dtype)]
    signatures = arrays[3].reshape(entry.documents, entry.permutations) if entry.permutations else None
    return Block(arrays[0], arrays[1], arrays[2], signatures)


def receipt_path(folder: Path, chunk: int) -> Path:
    """Where the receipt of a chunk is."""
    return folder / f"{chunk:06d}.json"


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write the receipt, sealed with a hash of itself."""
    body = orjson.dumps(receipt, option=orjson.OPT_SORT_KEYS)
    with writing(receipt_path(folder, receipt.chunk), durable=False) as file:
        file.write(xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body)


def read_receipt(folder: Path, chunk: int) -> Receipt | None:
    """The receipt of a chunk, or None if there is none or it is damaged."""
    try:
        seal, _, body = receipt_path(folder, chunk).read_bytes().partition(b"\n")
    except OSError:
        return None
    if seal != xxhash.xxh3_128_hexdigest(body).encode():
        return None
    fields = orjson.loads(body)
    blocks = [BlockEntry(**entry) for entry in fields.pop("blocks")]
    return Receipt(blocks=blocks, bad=[Unusable(**item) for item in fields.pop("bad")], **fields)


def part_is_good(folder: Path, chunk: int, dtype: np.dtype, engine: str | None = None) -> bool:
    """Whether the chunk is done, by `engine` if it matters: a whole receipt, and every block has the size and the hash
    the receipt names."""
    receipt = read_receipt(folder, chunk)
    if receipt is None or engine not in (None, receipt.engine):
        return False
    for entry in receipt.blocks:
        path = folder / entry.name
        if not path.is_file() or path.stat().st_size != _size(entry, dtype):
            return False
        if hash_file(path) != entry.hash:
            return False
    return True


def hash_file(path: Path) -> str:
    """xxh3-128 (hex) of a file, in bounded memory."""
    state = xxhash.xxh3_128()
    buffer = bytearray(min(1 << 22, path.stat().st_size) or 1)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            state.update(memoryview(buffer)[:size])
    return state.hexdigest()
