"""What lies on the claimed device: its storages, their bytes by part, and who waited for it."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROGRAMS = {"megatron_mixcpt": "", "kernels": "", "data_prep": "", "tests": "", "core": "megatron.core."}
"""Folders that code of interest is in, and what its modules' names begin with."""
HERE = Path(__file__).parent
CPU, META = torch.device("cpu"), torch.device("meta")
REST = "activations"  # the part of what is made outside every `part`


class DeviceError(RuntimeError):
    """What CUDA would have refused."""


@dataclass(frozen=True)
class Wait:
    """The host stood still until the device had finished all that it was given."""

    how: str  # the operator or function that waited
    where: str  # `file.py:function` of the program or megatron-core that is nearest
    phase: str  # what the run was doing
    queued: int  # operators that the device had been given since the last wait: 0 cost next to nothing
    stack: traceback.StackSummary = field(repr=False, compare=False)

    def told(self) -> str:
        return f"{self.how} at {self.where} ({self.phase}), {self.queued} operators queued\n" + "".join(
            self.stack.format()
        )


class _Open(threading.local):
    """What is open in a thread."""

    def __init__(self) -> None:
        self.parts, self.phases = [REST], ["setup"]
        self.making: bool | None = None


class Residency:
    """Which storages are on the device. Everything else is on the host.

    Args:
        memory: what the device's tensors truly are: CPU tensors with their values, or meta tensors without.

    Attributes:
        bytes: on the device now, by part.
        peak: the same when the sum was largest, since `forget_peak`.
        waits: in order.
    """

    def __init__(self, memory: torch.device = CPU) -> None:
        self.memory = memory
        self.bytes: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.waits: list[Wait] = []
        self._total = self._largest = 0
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}  # by address: itself, part, bytes
        self._pinned: set[int] = set()
        self._queued = 0
        self._open = _Open()

    def holds(self, tensor: Tensor) -> bool:
        if self.memory == META:
            return tensor.is_meta
        return tensor.untyped_storage()._cdata in self._storages

    def take(self, tensor: Tensor, part: str | None = None) -> None:
        """The tensor's storage is on the device from now on, as part of `part` or of the one that is open."""
        storage = tensor.untyped_storage()
        address, count = storage._cdata, storage.nbytes()
        self.drop(tensor)
        part = part or self._open.parts[-1]
        self._storages[address] = weakref.ref(storage, lambda _: self._drop(address)), part, count
        self._add(part, count)

    def drop(self, tensor: Tensor) -> None:
        """The tensor's storage is on the host."""
        self._drop(tensor.untyped_storage()._cdata)

    def resized(self, storage: torch.UntypedStorage) -> None:
        known = self._storages.get(storage._cdata)
        if known is not None:
            reference, part, count = known
            self._storages[storage._cdata] = reference, part, storage.nbytes()
            self._add(part, storage.nbytes() - count)

    def pin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        self._pinned.add(address)
        weakref.finalize(storage, self._pinned.discard, address)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def queue(self) -> None:
        """The device was given work."""
        self._queued += 1

    def wait(self, how: str) -> None:
        frame: Any = sys._getframe(1)
        stack = traceback.extract_stack(frame)
        frames = [entry for entry in stack if Path(entry.filename).parent != HERE or "test_" in entry.filename]
        phase, stack = self._open.phases[-1], traceback.StackSummary.from_list(frames)
        self.waits.append(Wait(how, _nearest(frames), phase, self._queued, stack))
        self._queued = 0

    def forget_peak(self) -> None:
        self._largest = self._total
        self.peak = +self.bytes

    @property
    def making(self) -> bool | None:
        """Whether what operators make now lies on the device, whatever they are given; None: where that lies."""
        return self._open.making

    @contextlib.contextmanager
    def made(self, *, on_device: bool) -> Iterator[None]:
        """What operators make inside lies on the device, or on the host, whatever they are given."""
        before, self._open.making = self._open.making, on_device
        try:
            yield
        finally:
            self._open.making = before

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made on the device inside belongs to the part `name`."""
        self._open.parts.append(name)
        try:
            yield
        finally:
            self._open.parts.pop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Waits inside belong to the phase `name`."""
        self._open.phases.append(name)
        try:
            yield
        finally:
            self._open.phases.pop()

    def _drop(self, address: int) -> None:
        known = self._storages.pop(address, None)
        if known is not None:
            self._add(known[1], -known[2])

    def _add(self, part: str, count: int) -> None:
        self.bytes[part] += count
        self._total += count
        if self._total > self._largest:
            self._largest = self._total
            self.peak = +self.bytes


def _nearest(frames: list[traceback.FrameSummary]) -> str:
    for frame in reversed(frames):
        path = Path(frame.filename)
        for folder, prefix in PROGRAMS.items():
            if folder in path.parts and (folder != "core" or "megatron" in path.parts):
                after = path.parts[len(path.parts) - path.parts[::-1].index(folder) :]
                return f"{prefix}{'/'.join(after)}:{frame.name}"
    return "elsewhere"
