"""Whole tensors out of a Hugging Face directory, checked against its configuration. Needs no megatron-core."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import EMBEDDING, OUTPUT, whole_shapes
from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.huggingface.gguf import gguf_option
from megatron_mixcpt.huggingface.names import IGNORED_SUFFIXES, hf_names, hf_shapes, places
from megatron_mixcpt.huggingface.tensorfiles import (
    MemorySource,
    PickleSource,
    SafetensorsSource,
    TensorSource,
    tensor_places,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf")
SAMPLES, SAMPLE_BYTES = 4, 4096  # of each tensor


def open_source(hf_dir: str | Path) -> TensorSource:
    """The weights of a Hugging Face directory: safetensors, pickled weights (without running code), or GGUF.

    GGUF is dequantised by transformers, which holds the whole model in memory.
    """
    folder = Path(hf_dir)
    if gguf := gguf_option(folder):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **gguf)
        return MemorySource(model.state_dict())
    pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).exists()]
    if pickled and not list(folder.glob("*.safetensors*")):
        return PickleSource(folder)
    return SafetensorsSource(folder)


def weights_fingerprint(hf_dir: str | Path) -> str:
    """xxh3-128 (hex) that tells one model's directory from another's: its configuration, and numbers of every tensor.

    Of each tensor in safetensors a few places are read, of other files one in a mebibyte: any training, merging or
    rounding changes it, a moved or copied directory does not. A handful of numbers edited by hand may go unnoticed.
    """
    state = xxhash.xxh3_128()
    folder = Path(hf_dir)
    for name in ("config.json", "adapter_config.json"):
        state.update((folder / name).read_bytes() if (folder / name).is_file() else b"")
    for path in sorted(path for ending in WEIGHT_ENDINGS for path in folder.glob(f"*{ending}")):
        size = path.stat().st_size
        state.update(f"{path.name} {size}\n".encode())
        with open(path, "rb", buffering=0) as file:
            for place in _sampled(path, size):
                file.seek(place)
                state.update(file.read(SAMPLE_BYTES))
    return state.hexdigest()


def _sampled(path: Path, size: int) -> Iterator[int]:
    """Where in a file of weights its fingerprint is taken, in bytes."""
    if path.suffix != ".safetensors":
        yield from range(0, size, 2**20)
        return
    for begin, end in tensor_places(path):
        yield from (begin + (end - begin) * sample // SAMPLES for sample in range(SAMPLES))


def widest(dtypes: set[torch.dtype]) -> torch.dtype:
    """The type that holds every value of `dtypes` exactly."""
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def read_names(source: TensorSource) -> set[str]:
    """Without the rotation, which a model may store too."""
    return {name for name in source.names() if not name.endswith(IGNORED_SUFFIXES)}


def stored_names(source: TensorSource, arch: Architecture, where: str) -> set[str]:
    """`read_names` without an output head that is tied, of which a model may store a copy.

    Raises VerificationError where that is no copy: transformers 5 does not tie it then.
    """
    names = read_names(source)
    (head,), (embedding,) = hf_names(OUTPUT, arch), hf_names(EMBEDDING, arch)
    if arch.tie_word_embeddings and head in names:
        if embedding in names and not torch.equal(*(_read(source, name) for name in (head, embedding))):
            raise VerificationError(
                f"{where}: config.json says tie_word_embeddings, and {head} is not {embedding} (adapters that were "
                "merged into both leave that): set tie_word_embeddings to false in config.json"
            )
        names.remove(head)
    return names


def _read(source: TensorSource, name: str) -> Tensor:
    tensor = torch.empty(source.shape(name), dtype=source.dtype(name))
    source.read_into(name, tensor)
    return tensor


def check_names(source: TensorSource, arch: Architecture, where: str) -> None:
    """Raise VerificationError unless the source holds exactly the tensors that `arch` has."""
    expected, present = set(hf_shapes(arch)), stored_names(source, arch, where)
    missing, unknown = sorted(expected - present), sorted(present - expected)
    if missing:
        raise VerificationError(f"{where} lacks {len(missing)} tensors, first {missing[0]}: copy or download it again")
    if unknown:
        raise VerificationError(
            f"{where} has {len(unknown)} tensors that its config.json ({arch.model_type}) has no place for, "
            f"first {unknown[0]}"
        )


def whole_tensor(source: TensorSource, name: str, arch: Architecture, rows: int, where: str) -> Tensor:
    """One whole tensor from its Hugging Face parts.

    `rows` is the vocabulary of the source. Where `arch` has more (added tokens), each new row is the mean of the
    source's rows, taken in fp32: a new token then starts out as likely as the average one
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    source_arch = dataclasses.replace(arch, vocab_size=rows)
    shapes = hf_shapes(source_arch)
    parts = hf_names(name, arch)
    for part in parts:
        if source.shape(part) != shapes[part]:
            raise VerificationError(f"{where}: {part} is {source.shape(part)}, its config.json says {shapes[part]}")
    whole = torch.empty(whole_shapes(source_arch)[name], dtype=widest({source.dtype(part) for part in parts}))
    for part, views in zip(parts, places(name, whole, arch)):
        if len(views) == 1:
            source.read_into(part, views[0])
            continue
        fused = torch.empty(shapes[part], dtype=whole.dtype)
        source.read_into(part, fused)
        for view, values in zip(views, fused.flatten().split([view.numel() for view in views])):
            view.copy_(values.view(view.shape))
    if name in (EMBEDDING, OUTPUT) and arch.vocab_size > rows:
        mean = whole.float().mean(dim=0, keepdim=True).to(whole.dtype)
        whole = torch.cat([whole, mean.expand(arch.vocab_size - rows, -1)])
    return whole
