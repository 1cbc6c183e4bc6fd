"""Hugging Face checkpoints in and out, bit for bit, tensor by tensor, on any tensor x pipeline grid."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import EMBEDDING, is_of_experts, shard, unshard, whole_shapes
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.files import claim
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.metadata import write_metadata
from megatron_mixcpt.huggingface.names import hf_names, hf_shapes, split
from megatron_mixcpt.huggingface.tensorfiles import SafetensorsWriter
from megatron_mixcpt.huggingface.weights import check_names, open_source, whole_tensor
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.model.place import place_here
from megatron_mixcpt.runtime.first_rank import from_first


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


def _gather(model: StageModel) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor) over the model, the tensor on rank 0 and None elsewhere. Collective over model ranks."""
    mine = {slot.name: slot.parameter.detach() for slot in model.slots() if not _is_tied_copy(model, slot.name)}
    tensor_group, pipeline_group = model.tp_group, model.pp_group
    expert_group = parallel_state.get_expert_tensor_and_model_parallel_group()
    place = place_here()
    leads = place.tensor == place.expert == 0
    stage, stages = pipeline_group.rank(), pipeline_group.size()
    for name, shape in whole_shapes(model.arch).items():
        whole = None
        if name in mine:
            group = expert_group if is_of_experts(name) else tensor_group
            parts = [torch.empty_like(mine[name]) for _ in range(group.size())]
            dist.all_gather(parts, mine[name].contiguous(), group=group)
            if leads:
                whole = unshard(name, parts, model.arch.vocab_size, place.experts)
        if stages > 1 and leads:
            owner = _owner(name, model)
            ranks = dist.get_process_group_ranks(pipeline_group)
            if owner and stage == owner:
                dist.send(whole.contiguous(), ranks[0], group=pipeline_group)  # type: ignore[union-attr]
                whole = None
            elif owner and stage == 0:
                whole = torch.empty(shape, dtype=model.config.params_dtype, device=torch.cuda.current_device())
                dist.recv(whole, ranks[owner], group=pipeline_group)
        yield name, whole


def _is_tied_copy(model: StageModel, name: str) -> bool:
    return name == EMBEDDING and not model.pre_process


def _owner(name: str, model: StageModel) -> int:
    """The pipeline stage that holds a whole tensor."""
    if name == EMBEDDING:
        return 0
    if name.startswith("decoder.layers."):
        return model.stages.owner(int(name.split(".")[2]))
    return model.stages.pipeline - 1


def save_hf(
    model: StageModel,
    arch: Architecture,
    out_dir: str | Path,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    source_dir: str | Path | None = None,
    card: str | None = None,
) -> None:
    """Write a directory that transformers loads. Every rank calls; the first writes.

    Args:
        tokenizer_dir: tokenizer and chat template, laid over those of `source_dir`.
        dtype: of the written weights; the model's when not given.
        source_dir: the Hugging Face directory that the model came from: its config.json and generation_config.json
            are carried over. Without it they are written from `arch`.
        card: text of README.md, the model card.

    Raises:
        ConfigError: `out_dir` exists and is not empty.
    """
    dtype = dtype or model.config.params_dtype
    first = dist.get_rank() == 0
    out = Path(out_dir)
    from_first(lambda: claim(out))
    writer = SafetensorsWriter(out, hf_shapes(arch), dtype) if first else nullcontext()
    if parallel_state.get_expert_data_parallel_rank() == 0:
        with writer as open_writer:
            for name, whole in _gather(model):
                if whole is not None and open_writer is not None:
                    for part, tensor in zip(hf_names(name, arch), split(name, whole, arch)):
                        open_writer.write(part, tensor)
    if first:
        write_metadata(out, arch, dtype, tokenizer_dir, source_dir, card)
    dist.barrier()
