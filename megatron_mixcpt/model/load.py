"""Hugging Face checkpoints into a model, bit for bit, tensor by tensor, on any tensor x expert x pipeline grid."""

import dataclasses
from pathlib import Path

import torch

from megatron_mixcpt.architecture.layout import shard
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.weights import check_names, open_source, whole_tensor
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.model.place import place_here
from megatron_mixcpt.runtime.watchdog import alive


@torch.no_grad()
def load_hf(model: StageModel, hf_dir: str | Path, trust_remote_code: bool = False) -> None:
    """Fill this rank's shard of `model` in place from a Hugging Face directory.

    A model with a larger vocabulary than the directory's gets new rows (see `whole_tensor`). Values are converted to
    the model's type; from a 16-bit file into fp32 that is exact.

    Raises:
        ConfigError: the directory's architecture is another than the model's, or not supported.
        VerificationError: weights are missing, unknown, truncated or of the wrong shape.
    """
    arch, where = model.arch, str(hf_dir)
    source_arch = architecture_from_hf(hf_dir, trust_remote_code)
    rows = source_arch.vocab_size
    differing = [
        f"{field.name} {getattr(source_arch, field.name)} != {getattr(arch, field.name)}"
        for field in dataclasses.fields(arch)
        if field.name != "vocab_size" and getattr(source_arch, field.name) != getattr(arch, field.name)
    ]
    if rows > arch.vocab_size:
        differing.append(f"vocab_size {rows} > {arch.vocab_size}")
    if differing:
        raise ConfigError(f"{where} is another architecture than the model: {', '.join(differing)}")
    source = open_source(hf_dir)
    check_names(source, source_arch, where)
    place = place_here()
    for slot in model.slots():
        whole = whole_tensor(source, slot.name, arch, rows, where)
        slot.parameter.copy_(shard(slot.name, whole, place, model.vocab_size))
        alive()
