"""`mixcpt train CONFIG [--nproc N] [key=value ...]`."""

from __future__ import annotations

import argparse

from megatron_mixcpt.runtime.launcher import add_nproc
from megatron_mixcpt.runtime.stop import StopRequest

NAME = "train"
HELP = """Train on a mixture with Mix-CPT's loss, on one process or many. Running the same command again resumes from
the newest checkpoint of the run directory that verifies. SIGTERM, SIGUSR1 or ^C stop after the step in flight, save,
and exit 75."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", help="YAML file: model, data, parallel, train, loss, teacher, eval, checkpoint, run_dir"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the file's, as train.lr=1e-5"
    )
    add_nproc(parser)
    parser.add_argument(
        "--trust",
        action="store_true",
        help="resume even from a checkpoint without a manifest: loading it may run any program it carries",
    )


def run(args: argparse.Namespace) -> int:
    return start(NAME, args)


def start(command: str, args: argparse.Namespace) -> int:
    """Train here, or in the ranks that are started for it."""
    with StopRequest() as stop:  # a stop while the libraries load is a stop like any other
        from megatron_mixcpt.config import Config, load_config

        config = load_config(Config, args.config, args.overrides)
        config.check_command(command, args.config)
        from megatron_mixcpt.runtime.launcher import is_distributed, launch
        from megatron_mixcpt.train.early import check_early
        from megatron_mixcpt.train.ended import check_run_dir, ending, finished, following

        # What needs no library that takes seconds to load is told first.
        mix = check_early(config, args.nproc)
        check_run_dir(config, mix)
        if not is_distributed() and finished(config):
            print(ending(config))
            return 0
        from megatron_mixcpt.runtime.parallel import integer_variable
        from megatron_mixcpt.train.loop import train
        from megatron_mixcpt.train.setup import check

        # Mistakes are told before any process or group starts.
        check(config, integer_variable("WORLD_SIZE", args.nproc))
        stop.check()
        if args.nproc > 1 and not is_distributed():
            trust = ["--trust"] if args.trust else []
            code = launch(args.nproc, [command, args.config, *args.overrides, *trust])
        else:
            train(config, trust=args.trust)
            code = 0
        if code == 0 and not is_distributed():  # a rank's run may be part of something larger, as a rehearsal
            print(following(config))
    return code
