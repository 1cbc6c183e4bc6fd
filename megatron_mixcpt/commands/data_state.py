"""`mixcpt data-state RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mixcpt.errors import ConfigError

NAME = "data-state"
HELP = """What a run (or one of its checkpoints) has consumed of each source: samples, passes over the data, target
tokens, and the shares asked for and realised."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", help="run directory or checkpoint")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.checkpoint.info import read_info
    from megatron_mixcpt.checkpoint.store import is_checkpoint, list_checkpoints
    from megatron_mixcpt.data.position import sources_of

    path = Path(args.path)
    found = [path] if is_checkpoint(path) else list_checkpoints(path / "checkpoints")
    if not found:
        raise ConfigError(f"{path}: neither a checkpoint nor a run directory with one")
    info = read_info(found[0])
    training = info.training
    if training is None:
        raise ConfigError(f"{found[0]}: holds no position in the data; `mixcpt train` did not write it")
    sources = sources_of(training.data)
    total = sum(source.drawn for source in sources)
    since = sum(source.since for source in sources)
    print(f"{found[0].name}: {total} samples in {info.step} steps, sample stream {training.sample_stream}")
    shares = f"{'share of samples':>17} {'realised':>9}"
    print(f"{'source':20} {shares} {'samples':>10} {'of':>10} {'passes':>8} {'target tokens':>14}")
    for source in sources:
        realised = source.since / since if since else 0.0
        print(
            f"{source.name:20} {source.weight:17.2%} {realised:9.2%} {source.drawn:10} {source.sequences:10} "
            f"{source.drawn / source.sequences:8.2f} {training.tokens_by_source.get(source.name, 0):14}"
        )
    if since != total:
        print(f"realised: over the {since} samples since the mixture was changed")
    return 0
