"""`mixcpt select CONFIG [--nproc N] [key=value ...]`."""

from __future__ import annotations

import argparse

from megatron_mixcpt.runtime.launcher import add_nproc
from megatron_mixcpt.runtime.stop import StopRequest

NAME = "select"
HELP = """Score the instruction and preference records of a mixture under a model, choose a few, and write them as
mixtures for `mixcpt align`. The same command goes on where it was stopped, and chooses anew from the same scores where
only the choice has changed. For example: mixcpt select select.yaml --nproc 2 select.by=fas select.n=500"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file: model, data, parallel, select, out")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the file's, as select.n=100"
    )
    add_nproc(parser)


def run(args: argparse.Namespace) -> int:
    with StopRequest() as stop:
        from megatron_mixcpt.config import load_config
        from megatron_mixcpt.runtime.launcher import is_distributed, launch
        from megatron_mixcpt.select.config import SelectConfig

        config = load_config(SelectConfig, args.config, args.overrides)
        from megatron_mixcpt.runtime.parallel import check_grid, integer_variable
        from megatron_mixcpt.select.candidates import prepare_candidates
        from megatron_mixcpt.select.select import select
        from megatron_mixcpt.train.setup import read_model_and_mix

        # Mistakes are told before any process starts.
        world_size = integer_variable("WORLD_SIZE", args.nproc)
        grid = config.parallel
        check_grid(world_size, grid.tensor, grid.pipeline, grid.context, grid.expert)
        read_model_and_mix(config.as_training())
        if not is_distributed():
            prepare_candidates(config)
        stop.check()
        if args.nproc > 1 and not is_distributed():
            return launch(args.nproc, ["select", args.config, *args.overrides])
        select(config)
    return 0
