"""`mixcpt export RUN_OR_CKPT --out DIR [--adapter]`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mixcpt.model.origin import Origin
    from megatron_mixcpt.model.weights import WholeTensors

NAME = "export"
HELP = """Write a training run (its newest complete checkpoint), one of its checkpoints, or a converted checkpoint as a
Hugging Face directory that transformers loads: weights, configuration, tokenizer and a model card. LoRA is merged into
the weights it was trained beside; --adapter writes the adapter alone, LoRA in PEFT's format, ALoRA for
megatron_mixcpt.hf_alora."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_CKPT", help="run directory or checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="type of the weights (default: as trained)")
    parser.add_argument("--adapter", action="store_true", help="write the trained adapter in place of a whole model")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.errors import ConfigError

    if args.adapter and args.dtype:
        raise ConfigError("--dtype is for whole models: an adapter is written as it was trained")
    if args.adapter:
        print(f"{args.out}: exported; {export_adapter(Path(args.source), Path(args.out))}")
    else:
        export(Path(args.source), Path(args.out), args.dtype)
        print(f"{args.out}: exported; transformers loads it")
    return 0


def export(source: Path, out: Path, dtype: str | None = None) -> None:
    """Write the directory, tensor by tensor; it appears under its name when it is complete.

    Raises:
        VerificationError: there is no complete checkpoint, or it is damaged.
        ConfigError: `out` is not empty, what the run started from is gone, or its adapter cannot be merged.
    """
    from megatron_mixcpt.files import new_directory
    from megatron_mixcpt.model.origin import find_origin
    from megatron_mixcpt.model.weights import open_weights

    origin = find_origin(source)
    weights = open_weights(origin)
    with new_directory(out) as partial:
        _write_model(partial, origin, weights, dtype, f"exporting {source.name}")


def export_adapter(source: Path, out: Path) -> str:
    """Write the adapter's directory; it appears under its name when it is complete. Returns how it is loaded.

    The base model is named where it is a Hugging Face directory, and else written into `base/` beside the adapter.

    Raises as `export`, and ConfigError where the run trained no adapter.
    """
    from megatron_mixcpt import hf_alora
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.files import new_directory
    from megatron_mixcpt.model.adapter_files import write_directory
    from megatron_mixcpt.model.adapter_layout import adapted_linears
    from megatron_mixcpt.model.adapter_state import read_adapters
    from megatron_mixcpt.model.card import model_card
    from megatron_mixcpt.model.hf_metadata import copy_tokenizer
    from megatron_mixcpt.model.origin import find_origin, hf_base
    from megatron_mixcpt.model.weights import open_base

    origin = find_origin(source)
    if origin.adapter is None:
        raise ConfigError(f"{source} trained all weights, no adapter: leave --adapter out")
    hf = hf_base(origin.config, origin.arch, origin.adapter)
    base = str(hf) if hf else "base"
    with new_directory(out) as partial:
        if not hf:
            (partial / base).mkdir()
            _write_model(partial / base, origin, open_base(origin), None, f"exporting the base of {source.name}")
        tensors = read_adapters(origin.checkpoint, adapted_linears(origin.arch, origin.adapter))
        write_directory(partial, origin.arch, origin.adapter, tensors, base)
        for folder in (origin.source_dir, origin.tokenizer_dir):  # the second over the first, as beside a whole model
            if folder:
                copy_tokenizer(folder, partial)
        (partial / "README.md").write_text(model_card(origin))
        if origin.adapter.method == "alora":
            shutil.copyfile(hf_alora.__file__, partial / "hf_alora.py")
    if origin.adapter.method == "lora":
        return f"peft loads it over {hf or out / base}"
    return "megatron_mixcpt.hf_alora.load_alora loads it"


def _write_model(folder: Path, origin: Origin, weights: WholeTensors, dtype: str | None, title: str) -> None:
    from megatron_mixcpt.model.card import model_card
    from megatron_mixcpt.model.hf_metadata import write_metadata
    from megatron_mixcpt.model.hf_names import hf_names, hf_shapes, split
    from megatron_mixcpt.model.hf_weights import DTYPES
    from megatron_mixcpt.model.layout import whole_shapes
    from megatron_mixcpt.model.progress import tensor_progress
    from megatron_mixcpt.model.stream import one_thread, read_ahead
    from megatron_mixcpt.model.tensorfiles import SafetensorsWriter

    written, arch = DTYPES[dtype] if dtype else weights.dtype, origin.arch
    shapes = whole_shapes(arch)
    with (
        one_thread(),
        tensor_progress(title, len(shapes)) as done,
        SafetensorsWriter(folder, hf_shapes(arch), written) as writer,
    ):
        for name, whole in read_ahead(shapes, weights.read):
            for part, tensor in zip(hf_names(name), split(name, whole, arch)):
                writer.write(part, tensor)
            done(name)
    write_metadata(folder, arch, written, origin.tokenizer_dir, origin.source_dir, model_card(origin))
