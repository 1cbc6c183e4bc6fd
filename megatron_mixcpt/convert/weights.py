"""Whole tensors of any checkpoint, one at a time and without building the model; LoRA is merged into them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_mixcpt.adapters.files import whole_delta
from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.adapters.state import read_adapters
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.init import initial_tensor
from megatron_mixcpt.architecture.layout import whole_shapes
from megatron_mixcpt.checkpoint.origin import Origin, check_start, find_origin, goes_on
from megatron_mixcpt.checkpoint.start import not_mergeable
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.stream import CheckpointSource
from megatron_mixcpt.huggingface.weights import DTYPES, check_names, open_source, whole_tensor


class WholeTensors(Protocol):
    """Whole tensors by the names of `layout.whole_shapes`, without vocabulary padding."""

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...


def open_weights(origin: Origin) -> WholeTensors:
    """The weights that a checkpoint stands for.

    Raises ConfigError where they cannot stand alone (ALoRA), or where what the run started from is gone.
    """
    if origin.adapter is None:
        return CheckpointSource(origin.checkpoint, origin.arch)
    if origin.adapter.method == "alora":
        raise ConfigError(f"{origin.checkpoint}: {not_mergeable(origin.adapter)}")
    return MergedWeights(origin)


def open_base(origin: Origin) -> WholeTensors:
    """The weights that the adapter of a run was trained beside."""
    assert origin.config is not None  # only runs train adapters
    model, dtype = origin.config.model, DTYPES[origin.config.train.dtype]
    check_start(origin.checkpoint, origin.info, model)
    if model.hf:
        return HFWeights(Path(model.hf), origin.arch, dtype)
    if model.checkpoint:
        start = find_origin(Path(model.checkpoint))
        if goes_on(start.adapter, origin.adapter):
            return open_base(start)
        return open_weights(start)
    return InitialWeights(origin.arch, origin.config.train.seed, dtype)


class HFWeights:
    """Of a Hugging Face directory, with rows for added tokens where `arch` has more."""

    def __init__(self, folder: Path, arch: Architecture, dtype: torch.dtype) -> None:
        self.dtype = dtype
        source_arch = architecture_from_hf(folder)
        self._arch, self._rows, self._where = arch, source_arch.vocab_size, str(folder)
        self._source = open_source(folder)
        check_names(self._source, source_arch, self._where)

    def read(self, name: str) -> Tensor:
        return whole_tensor(self._source, name, self._arch, self._rows, self._where).to(self.dtype)


class InitialWeights:
    """The random ones of a preset."""

    def __init__(self, arch: Architecture, seed: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._arch, self._seed, self._shapes = arch, seed, whole_shapes(arch)

    def read(self, name: str) -> Tensor:
        return initial_tensor(name, self._shapes[name], self._arch, self._seed).to(self.dtype)


class MergedWeights:
    """Base weights plus LoRA, added in fp32."""

    def __init__(self, origin: Origin) -> None:
        assert origin.adapter is not None
        self._base = open_base(origin)
        self._linears = {linear.linear + ".weight": linear for linear in adapted_linears(origin.arch, origin.adapter)}
        self._tensors = read_adapters(origin.checkpoint, self._linears.values())

    @property
    def dtype(self) -> torch.dtype:
        return self._base.dtype

    def read(self, name: str) -> Tensor:
        whole = self._base.read(name)
        if name in self._linears:
            whole = (whole.float() + whole_delta(self._linears[name], self._tensors)).to(self.dtype)
        return whole
