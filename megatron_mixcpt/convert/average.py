"""Weight averaging, (1 - alpha) base + alpha tuned: the free baseline against forgetting.

As WiSE-FT (arXiv 2109.01903) does for image models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.files import new_directory, record_made
from megatron_mixcpt.hf_alora import is_alora
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.metadata import TOKENIZER_FILES
from megatron_mixcpt.huggingface.stream import one_thread
from megatron_mixcpt.huggingface.tensorfiles import SafetensorsWriter, TensorSource
from megatron_mixcpt.huggingface.weights import open_source, read_names, stored_names, widest


def average(
    base: Path,
    tuned: Path,
    alpha: float,
    out: Path,
    made: dict[str, Any] | None = None,
    *,
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Write the average of two Hugging Face directories of one architecture, with `tuned`'s tokenizer and settings.

    One tensor of each model is in memory at a time. The arithmetic is fp32, the result has `tuned`'s type. It appears
    under its name when it is complete, with `made` written down in it (files.record_made).

    Raises:
        ConfigError: they are not of one architecture, or `out` is not empty.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"--alpha {alpha:g}: between 0 (the base model) and 1 (the tuned model)")
    first, second = open_source(base), open_source(tuned)
    names = _common(first, second, base, tuned)
    shapes = {name: second.shape(name) for name in names}
    with new_directory(out) as partial:
        with one_thread(), SafetensorsWriter(partial, shapes, widest({second.dtype(name) for name in names})) as writer:
            for name in names:
                mean = torch.lerp(_read(first, name), _read(second, name), alpha)
                writer.write(name, mean.to(second.dtype(name)))
                done(name)
        for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
            if (tuned / name).exists():
                shutil.copyfile(tuned / name, partial / name)
        (partial / "README.md").write_text(
            f"# {out.name}\n\nWeights {1 - alpha:g} x `{base.name}` + {alpha:g} x `{tuned.name}`, averaged by mixcpt.\n"
        )
        if made is not None:
            record_made(partial, made)


LM_HEAD = "lm_head.weight"


def num_tensors(folder: Path) -> int:
    """Of a Hugging Face directory. Raises ConfigError where it holds an adapter instead of a model."""
    if is_alora(folder):
        raise ConfigError(f"{folder}: an ALoRA adapter cannot be merged into its base, so it has no average with it")
    return len(open_source(folder).names())


def _read(source: TensorSource, name: str) -> Tensor:
    place = torch.empty(source.shape(name), dtype=torch.float32)
    source.read_into(name, place)
    return place


def _names(source: TensorSource, folder: Path) -> set[str]:
    """Of tensors that are read."""
    tied = LM_HEAD in source.names()  # perhaps; models without one need be of no known family
    return stored_names(source, architecture_from_hf(folder), str(folder)) if tied else read_names(source)


def _common(first: TensorSource, second: TensorSource, base: Path, tuned: Path) -> list[str]:
    """Names of the tensors, which both have in the same shapes."""
    names, others = (_names(source, folder) for source, folder in ((first, base), (second, tuned)))
    differing = sorted(names ^ others)
    if differing:
        raise ConfigError(
            f"{base} and {tuned} are not of one architecture: {differing[0]} is in one of them alone ({len(differing)} "
            "such tensors)"
        )
    for name in sorted(names):
        if first.shape(name) != second.shape(name):
            raise ConfigError(
                f"{name} is {first.shape(name)} in {base} and {second.shape(name)} in {tuned}: only models of one "
                "architecture and vocabulary have an average (a base without the tokens that training added: give the "
                "converted checkpoint that the run started from)"
            )
    return sorted(names)
