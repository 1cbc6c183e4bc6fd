"""`mixcpt convert --hf DIR --out CKPT`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "convert"
HELP = """Import a Hugging Face model as a checkpoint, tensor by tensor, without a GPU. It loads into any TP x PP
layout, and `mixcpt export` gives every bit back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf", required=True, metavar="DIR", help="local Hugging Face model directory, or one with a GGUF"
    )
    parser.add_argument("--out", required=True, metavar="CKPT", help="checkpoint directory to write")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="type of the weights (default: as they are)")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="tokenizer that adds tokens to the model's own; each new embedding row is the mean of the others",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let transformers run configuration code that lies in DIR"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.convert.convert import convert

    convert(Path(args.hf), Path(args.out), args.dtype, args.tokenizer and Path(args.tokenizer), args.trust_remote_code)
    print(f"{args.out}: converted; `mixcpt export {args.out} --out DIR` turns it back")
    return 0
