"""`mixcpt rehearse CONFIG [--nproc N] [key=value ...]`."""

from __future__ import annotations

import argparse

from megatron_mixcpt.commands.options import count

NAME = "rehearse"
HELP = """Run a configuration in small on this machine's CPU: the same tensor x pipeline x context grid, two
data-parallel replicas at most, the same data, schedule, loss and teacher code, with a small random model of the same
family; a few steps, validation, saving and resuming. What goes wrong here would have gone wrong on the cluster.
 Example: mixcpt rehearse train.yaml --nproc 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the YAML file that `mixcpt train` takes")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the file's")
    parser.add_argument(
        "--nproc", type=count, metavar="N", help="ranks of the real run (default: two model replicas, or one)"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.config import Config, load_config

    config = load_config(Config, args.config, args.overrides)
    config.check_command("train", args.config)
    from megatron_mixcpt.rehearse.rehearsal import rehearse

    return rehearse(config, args.nproc)
