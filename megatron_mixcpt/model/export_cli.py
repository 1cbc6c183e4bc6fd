"""`mixcpt export RUN_OR_CKPT --out DIR`."""

import argparse
import shutil
from pathlib import Path

NAME = "export"
HELP = """Write a training run (its newest complete checkpoint), one of its checkpoints, or a converted checkpoint as a
Hugging Face directory that transformers loads: weights, configuration, tokenizer and a model card."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_CKPT", help="run directory or checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="type of the weights (default: as trained)")


def run(args: argparse.Namespace) -> int:
    export(Path(args.source), Path(args.out), args.dtype)
    print(f"{args.out}: exported; transformers loads it")
    return 0


def export(source: Path, out: Path, dtype: str | None = None) -> None:
    """Write the directory, tensor by tensor; it appears under its name when it is complete.

    Raises:
        VerificationError: there is no complete checkpoint, or it is damaged.
        ConfigError: `out` is not empty, or what the run started from is gone.
    """
    from megatron_mixcpt.model.card import model_card
    from megatron_mixcpt.model.hf_metadata import claim, write_metadata
    from megatron_mixcpt.model.hf_names import hf_names, hf_shapes, split
    from megatron_mixcpt.model.hf_weights import DTYPES
    from megatron_mixcpt.model.layout import whole_shapes
    from megatron_mixcpt.model.origin import find_origin
    from megatron_mixcpt.model.progress import tensor_progress
    from megatron_mixcpt.model.stream import CheckpointSource, one_thread, read_ahead
    from megatron_mixcpt.model.tensorfiles import SafetensorsWriter

    origin = find_origin(source)
    arch, weights = origin.arch, CheckpointSource(origin.checkpoint, origin.arch)
    written = DTYPES[dtype] if dtype else weights.dtype
    claim(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was interrupted
    partial.mkdir()
    names = list(whole_shapes(arch))
    with (
        one_thread(),
        tensor_progress(f"exporting {source.name}", len(names)) as done,
        SafetensorsWriter(partial, hf_shapes(arch), written) as writer,
    ):
        for name, whole in read_ahead(names, weights.read):
            for part, tensor in zip(hf_names(name), split(name, whole, arch)):
                writer.write(part, tensor)
            done(name)
    write_metadata(partial, arch, written, origin.tokenizer_dir, origin.source_dir, model_card(origin))
    out.rmdir()
    partial.rename(out)
