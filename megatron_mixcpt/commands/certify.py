"""`mixcpt certify CONFIG [--nproc N] [--device cpu|cuda] [key=value ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "certify"
HELP = """Prove that the trainer computes the right thing in the settings of a run: its grid, dtype, recomputation,
optimizer, loss, teacher and adapter, with a small model of the same family and rows of its own data, against an oracle
in fp64 that shares no code with it. Exit code 3 where something is off, with what it appears with. Example: mixcpt
certify train.yaml --nproc 16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the YAML file that `mixcpt train` or `mixcpt align` takes")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the file's")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="ranks of the real run (default: two model replicas, or one)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where this machine has a device for each process"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of certificate and page (default: run_dir)")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.config import Config, load_config

    config = load_config(Config, args.config, args.overrides)
    from megatron_mixcpt.certify.certify import certify

    return certify(config, args.nproc, args.device, Path(args.out or config.run_dir))
