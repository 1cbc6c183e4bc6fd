"""The `.bin/.idx` files of megatron-core and the flags byte that goes with every token.

`.bin` holds the tokens of all sequences without a header. `.idx`, little-endian: magic, uint64 version, uint8 dtype
code, uint64 S (sequences), uint64 N (documents + 1), int32 lengths[S], int64 byte pointers[S], int64 documents[N].
This is the layout that `megatron.core.datasets.indexed_dataset` 0.16 reads; a test compares the bytes with its builder.
"""

import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megatron_mixcpt.errors import MixcptError, VerificationError
from megatron_mixcpt.files import writing

# The flags byte.
TARGET = 1 << 0  # the token counts as a label
KIND_SHIFT, KIND_MASK = 1, 0b11 << 1  # the two lower bits of the kind
DOC_START = 1 << 3  # first token of a document: never a target
ROLE_SHIFT, ROLE_MASK = 4, 0b11 << 4
PAD = 1 << 6
KIND_HIGH = 1 << 7  # the highest bit of the kind, which data of mixcpt-mix/1 never sets

KIND_DOMAIN, KIND_INSTRUCTION, KIND_CHOSEN, KIND_REJECTED, KIND_GENERAL = range(5)
KIND_NAMES = ("domain", "instruction", "preference-chosen", "preference-rejected", "general")
TEXT_KINDS = {"domain": KIND_DOMAIN, "general": KIND_GENERAL}  # kinds of sources whose records are plain text
ROLE_TEXT, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL = range(4)
ROLE_NAMES = ("text", "user", "assistant", "tool")

PIECE_BYTES = 1 << 20  # written and hashed at a time
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
HEADER_BYTES = 34
# Megatron's own limit: below it, tokens are stored in two bytes.
UINT16_VOCABULARY_LIMIT = 65500


def pack_flags(kind: int, role: int, target: bool) -> int:
    """The flags byte of an ordinary token (no document start, no padding)."""
    return _kind_bits(kind) | (role << ROLE_SHIFT) | (TARGET if target else 0)


def _kind_bits(kind: int) -> int:
    return ((kind << KIND_SHIFT) & KIND_MASK) | (KIND_HIGH if kind & 0b100 else 0)


def kind_of(flags: Any) -> Any:
    """The number of the kind in a flags byte, or in each of an array or tensor of them (of its dtype)."""
    return ((flags & KIND_MASK) >> KIND_SHIFT) | ((flags & KIND_HIGH) >> 5)


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron stores tokens of a vocabulary in: uint16 below 65,500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCABULARY_LIMIT else np.dtype("<i4")


def dtype_code(dtype: np.dtype) -> int:
    """Megatron's number for `dtype`. Raises ValueError for a dtype the format has no number for."""
    for code, known in DTYPE_CODES.items():
        if known == np.dtype(dtype):
            return code
    raise ValueError(
        f"dtype {dtype} cannot be stored in an .idx file; use one of {list(map(str, DTYPE_CODES.values()))}"
    )


def write_index(
    path: Path,
    dtype: np.dtype,
    lengths: np.ndarray,
    *,
    pointers: np.ndarray | None = None,
    documents: np.ndarray | None = None,
) -> None:
    """Write an `.idx` file atomically.

    Args:
        lengths: int [S], tokens in each sequence.
        pointers: int64 [S], first byte of each sequence in the `.bin`; default: one after the other.
        documents: int64 [N], `documents[i]` is the first sequence of document i and the last entry is S;
            default: every sequence is a document of its own.
    """
    dtype = np.dtype(dtype)
    lengths = np.ascontiguousarray(lengths, dtype="<i4")
    if pointers is None:
        pointers = np.zeros(len(lengths), dtype="<i8")
        # int64: the sum of int32 lengths overflows at 2^31 tokens.
        np.cumsum(lengths[:-1].astype("<i8") * dtype.itemsize, out=pointers[1:])
    if documents is None:
        documents = np.arange(len(lengths) + 1, dtype="<i8")
    with writing(path) as file:
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, dtype_code(dtype), len(lengths), len(documents)))
        file.write(lengths.data)
        file.write(np.ascontiguousarray(pointers, dtype="<i8").data)
        file.write(np.ascontiguousarray(documents, dtype="<i8").data)


def write_hashed(file: BinaryIO, state: Any, data: np.ndarray) -> None:
    """Append the bytes of an array and hash them, a piece at a time that stays in the processor's cache meanwhile.

    File systems, too, take several times as long over much larger writes.
    """
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
    for start in range(0, len(raw), PIECE_BYTES):
        piece = raw[start : start + PIECE_BYTES]
        file.write(piece)
        state.update(piece)


class IndexedWriter:
    """Streams sequences into `<prefix>.bin` and, on `finish`, writes `<prefix>.idx`.

    Files appear under their final names only when complete. `hash` is the xxh3-128 of the `.bin` bytes.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self._closing = ExitStack()
        self._file = self._closing.enter_context(writing(self.prefix.with_name(self.prefix.name + ".bin")))
        self._hash = xxhash.xxh3_128()
        self._lengths: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Append sequences: `tokens` [sum of lengths]; without `lengths` it is one sequence."""
        data = np.ascontiguousarray(tokens, dtype=self.dtype)
        lengths = np.array([len(data)] if lengths is None else lengths, dtype="<i4")
        if int(lengths.sum(dtype=np.int64)) != len(data):
            raise ValueError(f"lengths sum to {lengths.sum(dtype=np.int64)}, but {len(data)} tokens were given")
        write_hashed(self._file, self._hash, data)
        self._lengths.append(lengths)

    def finish(self, documents: np.ndarray | None = None) -> str:
        """Close the files and return the hash of the `.bin` bytes (hex). `documents`: see `write_index`."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, "<i4")
        index = self.prefix.with_name(self.prefix.name + ".idx")
        index.unlink(missing_ok=True)  # never an old index over a new .bin
        self._closing.close()
        write_index(index, self.dtype, lengths, documents=documents)
        return self._hash.hexdigest()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.__exit__(kind, error, trace)


class Indexed:
    """Read-only view of a `.bin/.idx` pair; `self[i]` is sequence i as a numpy array without a copy.

    Attributes:
        lengths: int32 [S]. pointers: int64 [S], bytes. documents: int64 [N]. tokens: dtype [T], the whole `.bin`.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index_path, bin_path = (self.prefix.with_name(self.prefix.name + end) for end in (".idx", ".bin"))
        for path in (index_path, bin_path):
            if not path.is_file():
                raise MixcptError(f"{path} does not exist; is the prefix right, and did `mixcpt preprocess` finish?")
        raw = np.fromfile(index_path, dtype=np.uint8)
        if len(raw) < HEADER_BYTES or raw[:9].tobytes() != MAGIC:
            raise VerificationError(f"{index_path} is not a Megatron index (wrong magic)")
        version, code, num_sequences, num_documents = struct.unpack("<QBQQ", raw[9:HEADER_BYTES].tobytes())
        if version != VERSION or code not in DTYPE_CODES:
            raise VerificationError(f"{index_path}: version {version}, dtype code {code} are not supported")
        expected = HEADER_BYTES + 12 * num_sequences + 8 * num_documents
        if len(raw) != expected:
            raise VerificationError(f"{index_path} has {len(raw)} bytes, its header promises {expected}: truncated?")
        self.dtype = DTYPE_CODES[code]
        at = HEADER_BYTES
        self.lengths = raw[at : at + 4 * num_sequences].view("<i4")
        at += 4 * num_sequences
        # The header is 34 bytes, so the int64 arrays are not aligned in the file: copy them into place.
        self.pointers = np.frombuffer(raw[at : at + 8 * num_sequences].tobytes(), dtype="<i8")
        self.documents = np.frombuffer(raw[at + 8 * num_sequences :].tobytes(), dtype="<i8")
        size = bin_path.stat().st_size
        if num_sequences:
            ends = self.pointers + self.lengths.astype(np.int64) * self.dtype.itemsize
            if self.lengths.min() < 0 or self.pointers.min() < 0 or ends.max() > size:
                raise VerificationError(f"{bin_path} has {size} bytes, but its index points outside: truncated?")
        if size % self.dtype.itemsize:
            raise VerificationError(f"{bin_path} has {size} bytes, not a multiple of {self.dtype.itemsize}")
        # An empty file cannot be mapped.
        self.tokens = (
            np.asarray(np.memmap(bin_path, dtype=self.dtype, mode="r")) if size else np.zeros(0, dtype=self.dtype)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]


def open_indexed(prefix: str | Path) -> Indexed:
    """Open `<prefix>.bin/.idx`. Raises MixcptError if missing, VerificationError if truncated or foreign."""
    return Indexed(prefix)
