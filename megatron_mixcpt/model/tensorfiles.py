"""Directories of tensors, read and written one tensor at a time so that memory does not grow with the model."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mixcpt.errors import ConfigError, VerificationError

SHARD_BYTES = 4 * 2**30
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class TensorSource(Protocol):
    """Named tensors on the CPU."""

    def names(self) -> set[str]: ...

    def dtypes(self) -> set[torch.dtype]: ...

    def read(self, name: str) -> Tensor: ...


class SafetensorsSource:
    """`model.safetensors`, or the shards named by `model.safetensors.index.json`."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self._files = self._find(folder, stem)

    @staticmethod
    def _find(folder: Path, stem: str) -> dict[str, Path]:
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if index.exists():
            try:
                files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise VerificationError(f"{index} is damaged ({error!r}): download or export it again") from error
            missing = sorted({path.name for path in files.values() if not path.exists()})
            if missing:
                raise VerificationError(f"{folder} lacks {', '.join(missing)}, named by {index.name}: copy it again")
            return files
        if single.exists():
            return dict.fromkeys(_names(single), single)
        if list(folder.glob(f"{stem}-*.safetensors")):
            raise VerificationError(f"{folder} has shards of safetensors but no {index.name}: copy it again")
        raise VerificationError(f"{folder} has no weights: neither {single.name} nor {index.name}")

    def names(self) -> set[str]:
        return set(self._files)

    def dtypes(self) -> set[torch.dtype]:
        """Types of the tensors, from the headers alone. Raises VerificationError where one is not a weight's."""
        found: dict[str, str] = {}
        for path in sorted(set(self._files.values())):
            with safe_open(path, "pt") as file:
                found |= {file.get_slice(name).get_dtype(): f"{path}: {name}" for name in file.keys()}  # noqa: SIM118
        for name, where in found.items():
            if name not in _DTYPES:
                raise VerificationError(f"{where} is {name}; weights must be fp32, fp16 or bf16")
        return {_DTYPES[name] for name in found}

    def read(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            # Opened anew for each tensor: the mapping's pages count as this process's memory while it is open.
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise VerificationError(f"{path}: cannot read {name} ({error}): copy or download it again") from error


def _names(path: Path) -> set[str]:
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise VerificationError(f"{path} is truncated or damaged ({error}): copy or download it again") from error


class MemorySource:
    """Tensors that are already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> set[str]:
        return set(self._tensors)

    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self._tensors.values()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class PickleSource(MemorySource):
    """`pytorch_model.bin` and its shards, read without running code from them (`weights_only`)."""

    def __init__(self, folder: Path) -> None:
        index = folder / "pytorch_model.bin.index.json"
        if index.exists():
            shards = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
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
        self._file.write(data.view(-1).view(torch.uint8).numpy().data)
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
