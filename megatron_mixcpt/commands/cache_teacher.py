"""`mixcpt cache-teacher CONFIG [--nproc N] [key=value ...]`."""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

from megatron_mixcpt.runtime.launcher import add_nproc
from megatron_mixcpt.runtime.stop import StopRequest

NAME = "cache-teacher"
HELP = """Compute the teacher's answers to all training data once, so that training runs without a teacher:
`mixcpt cache-teacher train.yaml teacher.source=cached teacher.cache=work/cache --nproc 2`, then `mixcpt train` with the
same settings. Keeps the most likely tokens, the label and the tail of every position. Running the same command again
goes on where it was stopped, and mends what is damaged."""


WHOLE_RUN = math.inf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the YAML file that `mixcpt train` or `mixcpt align` takes, with teacher.cache")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the file's")
    add_nproc(parser)
    parser.add_argument("--top-k", type=int, default=32, metavar="K", help="tokens kept a position (default 32)")
    parser.add_argument(
        "--bits", type=int, choices=[16, 32], default=16, help="of a log-probability: 16 (default) in steps of 2^-11"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="?",
        const=WHOLE_RUN,
        metavar="N",
        help="only the sequences that the first N steps draw (without N: train.steps). Such a cache serves runs of the "
        "same train.seed and weights alone; the default serves every run on the data",
    )


def run(args: argparse.Namespace) -> int:
    with StopRequest() as stop:
        from megatron_mixcpt.config import Config, load_config
        from megatron_mixcpt.errors import ConfigError
        from megatron_mixcpt.runtime.launcher import is_distributed, launch

        config = load_config(Config, args.config, args.overrides)
        if config.teacher.source != "cached" or not config.uses_teacher:
            raise ConfigError(
                "cache-teacher needs teacher.source=cached, teacher.cache=DIR and a loss.target: the configuration "
                "that will train on it"
            )
        from megatron_mixcpt.train.early import check_early

        check_early(config, args.nproc)
        from megatron_mixcpt.runtime.parallel import integer_variable
        from megatron_mixcpt.teacher.cache_fill import check_space, cost, new_identity
        from megatron_mixcpt.train.setup import check_layout

        arch, mix = check_layout(config, integer_variable("WORLD_SIZE", args.nproc))
        if config.teacher.hf is not None:
            from megatron_mixcpt.teacher.deepspeed import check_hf_teacher

            check_hf_teacher(config.teacher, mix)
        steps = config.train.steps if args.steps == WHOLE_RUN else args.steps
        if steps is not None and steps < 1:
            raise ConfigError(f"--steps {steps}: at least 1")
        identity = partial(new_identity, config, arch, mix, {}, top_k=args.top_k, bits=args.bits)
        planned = identity(steps=steps)
        check_space(Path(str(config.teacher.cache)), planned)
        if not is_distributed():
            print(cost(planned, identity(steps=config.train.steps)), file=sys.stderr)
        stop.check()
        if args.nproc > 1 and not is_distributed():
            own = ["--top-k", str(args.top_k), "--bits", str(args.bits)]
            own += [] if steps is None else ["--steps", str(steps)]
            return launch(args.nproc, ["cache-teacher", args.config, *args.overrides, *own])
        from megatron_mixcpt.train.cache_teacher import cache_teacher

        cache_teacher(config, stop, top_k=args.top_k, bits=args.bits, steps=steps)
    return 0
