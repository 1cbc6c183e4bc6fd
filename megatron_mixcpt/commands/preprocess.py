"""`mixcpt preprocess CONFIG`: from raw text to mixed token files."""

import argparse
import os
import signal
import sys
from types import FrameType

from megatron_mixcpt.commands.options import parse_shard
from megatron_mixcpt.errors import ConfigError, MixcptError, StoppedError
from megatron_mixcpt.files import reason

NAME = "preprocess"
HELP = "turn raw text, instructions and preference pairs into packed, mixed token files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("config", help="YAML file; docs/data.md explains every key")
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes (default: one a core)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--shard", metavar="I/N", help="only tokenize the I-th of N shares of the work (1 <= I <= N)")
    group.add_argument("--assemble", action="store_true", help="after all shards: put their parts together")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Raises MixcptError for what the user can act on."""
    from megatron_mixcpt.config.reader import load_config
    from megatron_mixcpt.data_prep.config import PreprocessConfig
    from megatron_mixcpt.data_prep.pipeline import preprocess

    workers = args.workers if args.workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1 (got {workers})")
    shard = parse_shard(args.shard) if args.shard else None
    config = load_config(PreprocessConfig, args.config, literal=True)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        mix = preprocess(config, workers=workers, shard=shard, assemble_only=args.assemble)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise MixcptError(f"{where}{reason(error)}; finished parts are kept") from error
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(mix if mix else f"shard {args.shard} done")
    if mix:
        print(f"next: mixcpt verify {config.out}, then mixcpt train with data.mix={mix}", file=sys.stderr)
    return 0


def _stop(signum: int, frame: FrameType | None) -> None:
    raise StoppedError("stopped on request; finished parts are kept, run the same command again to continue")
