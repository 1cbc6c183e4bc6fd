"""`mixcpt export RUN_OR_CKPT --out DIR [--adapter]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mixcpt.commands.options import add_allow_older

NAME = "export"
HELP = """Write a training run (its newest checkpoint, or the result of its forgetting budget), one of its checkpoints,
or a converted checkpoint as a Hugging Face directory that transformers loads: weights, configuration, tokenizer and a
model card. LoRA is merged into the weights it was trained beside; --adapter writes the adapter alone, LoRA in PEFT's
format, ALoRA for megatron_mixcpt.hf_alora."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_CKPT", help="run directory or checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="type of the weights (default: as trained)")
    parser.add_argument("--adapter", action="store_true", help="write the trained adapter in place of a whole model")
    add_allow_older(parser)


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.convert.export import export, export_adapter
    from megatron_mixcpt.errors import ConfigError

    if args.adapter and args.dtype:
        raise ConfigError("--dtype is for whole models: an adapter is written as it was trained")
    source, out = Path(args.source), Path(args.out)
    if args.adapter:
        print(f"{args.out}: {export_adapter(source, out, allow_older=args.allow_older)}")
    else:
        done = export(source, out, args.dtype, allow_older=args.allow_older)
        print(f"{args.out}: {'exported' if done else 'is there already'}; transformers loads it")
    return 0
