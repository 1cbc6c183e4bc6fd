"""Directories of tensors, read and written one tensor at a time so that memory does not grow with the model."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mixcpt.errors import ConfigError, VerificationError

SHARD_BYTES = 4 * 2**30
BLOCK_BYTES = 2**20
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def blocks(data: Any) -> Iterator[memoryview]:
    """The bytes of a buffer a mebibyte at a time: file systems take several times as long over larger writes."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), BLOCK_BYTES):
        yield view[start : start + BLOCK_BYTES]


class TensorSource(Protocol):
    """Named tensors in fp32, fp16 or bf16; what else is asked of raises VerificationError."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read_into(self, name: str, place: Tensor) -> None:
        """Fill `place`, of as many elements on the CPU, with the tensor's numbers in order."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: str
    shape: list[int]
    begin: int  # bytes from the start of the file
    end: int


def _entries(path: Path) -> dict[str, _Entry]:
    """The header of a safetensors file (https://huggingface.co/docs/safetensors), checked by that package."""
    try:
        with safe_open(path, "pt"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise VerificationError(f"{path} is truncated or damaged ({error}): copy or download it again") from error
    header.pop("__metadata__", None)
    return {
        name: _Entry(path, entry["dtype"], entry["shape"], *(8 + length + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
    }


def tensor_places(path: Path) -> list[tuple[int, int]]:
    """First byte of each tensor of a safetensors file and the byte behind its last, in order."""
    return sorted((entry.begin, entry.end) for entry in _entries(path).values())


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{index} is damaged ({error!r}): copy or download it again") from error


class SafetensorsSource:
    """`model.safetensors`, or the shards named by `model.safetensors.index.json`."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if not index.exists():
            if single.exists():
                self._entries = _entries(single)
                return
            if list(folder.glob(f"{stem}-*.safetensors")):
                raise VerificationError(f"{folder} has shards of safetensors but no {index.name}: copy it again")
            raise VerificationError(f"{folder} has no weights: neither {single.name} nor {index.name}")
        weight_map = _weight_map(index)
        shards = sorted({folder / file for file in weight_map.values()})
        missing = [path.name for path in shards if not path.exists()]
        if missing:
            raise VerificationError(f"{folder} lacks {', '.join(missing)}, named by {index.name}: copy it again")
        self._entries = {name: entry for path in shards for name, entry in _entries(path).items()}
        absent = sorted(weight_map.keys() - self._entries.keys())
        if absent:
            raise VerificationError(f"{folder}: no shard holds {absent[0]}, named by {index.name}: copy it again")

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise VerificationError(f"{entry.path}: {name} is {entry.dtype}; weights must be fp32, fp16 or bf16")
        return _DTYPES[entry.dtype]

    def read_into(self, name: str, place: Tensor) -> None:
        # Read, not mapped as the safetensors package would: mapped pages count as this process's memory while the
        # tensor lives, and come in one fault at a time.
        entry, dtype = self._entries[name], self.dtype(name)
        # A single element counts as contiguous at any stride, but only at 1 can it be seen as bytes.
        direct = place.dtype == dtype and place.is_contiguous() and place.stride(-1) == 1
        target = place if direct else torch.empty(place.shape, dtype=dtype)
        with open(entry.path, "rb") as file:
            file.seek(entry.begin)
            if file.readinto(target.view(-1).view(torch.uint8).numpy().data) != entry.end - entry.begin:
                raise VerificationError(f"{entry.path} is truncated: copy or download it again")
        if not direct:
            place.copy_(target)


class MemorySource:
    """Tensors that are already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors[name].dtype
        if dtype not in _DTYPE_NAMES:
            raise VerificationError(f"{name} is {dtype}; weights must be fp32, fp16 or bf16")
        return dtype

    def read_into(self, name: str, place: Tensor) -> None:
        place.copy_(self._tensors[name].view(place.shape))


class PickleSource(MemorySource):
    """`pytorch_model.bin` and its shards, read without running code from them (`weights_only`)."""

    def __init__(self, folder: Path) -> None:
        index = folder / "pytorch_model.bin.index.json"
        if index.exists():
            shards = {folder / name for name in _weight_map(index).values()}
        else:
            shards = {folder / "pytorch_model.bin"}
        tensors: dict[str, Tensor] = {}
        for path in sorted(shards):
            try:
                # Mapped: a tensor's bytes are read when it is.
                tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except FileNotFoundError as error:
                raise VerificationError(f"{path} is missing: copy or download it again") from error
            except Exception as error:  # torch and pickle raise many kinds
                raise VerificationError(
                    f"{path} cannot be read as plain weights ({error}); convert it to safetensors with a program "
                    "you trust it to"
                ) from error
        super().__init__(tensors)


class SafetensorsWriter:
    """Writes a known set of tensors in a known order into shards and an index, holding none of them.

    The format (https://huggingface.co/docs/safetensors) begins with the offsets of all tensors, which follow from
    shapes and type alone, so each tensor is written as it comes.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        stem: str = "model",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if dtype not in _DTYPE_NAMES:
            raise ConfigError(f"cannot write weights as {dtype}: use fp32, fp16 or bf16")
        self._dtype = dtype
        self._shapes = dict(shapes)
        self._order = list(shapes)
        self._written = 0
        self._file: BinaryIO | None = None
        sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, shape in shapes.items()}
        shards: list[list[str]] = [[]]
        for name, size in sizes.items():
            if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
                shards.append([])
            shards[-1].append(name)
        many = len(shards) > 1
        self._paths = {
            names[0]: folder / (f"{stem}-{i:05}-of-{len(shards):05}.safetensors" if many else f"{stem}.safetensors")
            for i, names in enumerate(shards, 1)
        }
        self._headers = {names[0]: self._header(names, sizes) for names in shards}
        self._index: dict | None = None
        if many:
            weight_map = {name: self._paths[names[0]].name for names in shards for name in names}
            self._index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        self._index_path = folder / f"{stem}.safetensors.index.json"

    def _header(self, names: list[str], sizes: Mapping[str, int]) -> bytes:
        entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            entries[name] = {
                "dtype": _DTYPE_NAMES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, offset + sizes[name]],
            }
            offset += sizes[name]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        return struct.pack("<Q", len(text)) + text

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; its order and shape must be the announced ones."""
        expected = self._order[self._written]
        if name != expected or tuple(tensor.shape) != self._shapes[name]:
            raise ValueError(f"expected {expected} {self._shapes[expected]}, got {name} {tuple(tensor.shape)}")
        if name in self._paths:
            if self._file:
                self._file.close()
            self._file = open(self._paths[name], "wb")  # noqa: SIM115 (closed by the next shard or __exit__)
            self._file.write(self._headers[name])
        assert self._file is not None
        data = tensor.detach().to("cpu", self._dtype).contiguous()
        for block in blocks(data.view(-1).view(torch.uint8).numpy().data):
            self._file.write(block)
        self._written += 1

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            self._file.close()
        if kind is not None:
            return
        if self._written != len(self._order):
            raise ValueError(f"{len(self._order) - self._written} tensors were not written")
        if self._index:
            self._index_path.write_text(json.dumps(self._index, indent=2) + "\n")
