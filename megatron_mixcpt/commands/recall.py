"""`mixcpt recall CONFIG [--nproc N] [--shard I/N | --assemble] [key=value ...]`."""

from __future__ import annotations

import argparse

from megatron_mixcpt.runtime.launcher import add_nproc
from megatron_mixcpt.runtime.stop import StopRequest

NAME = "recall"
HELP = """Let the model write its own rehearsal data: instructions with answers out of its chat template, and free text;
filtered, compared with your documents and evaluation files, ready for `mixcpt preprocess`. The same command goes on
where it was stopped, and draws only the rest when n grows. For example: mixcpt recall recall.yaml --nproc 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file: model, out, n, engine, sampling, filters, overlap (docs/recall.md)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the file's, as n.text=1000"
    )
    add_nproc(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--shard", metavar="I/N", help="only draw the I-th of N shares of the work (1 <= I <= N)")
    group.add_argument("--assemble", action="store_true", help="after all shards: filter and write the result")


def run(args: argparse.Namespace) -> int:
    with StopRequest() as stop:
        from megatron_mixcpt.commands.options import parse_shard
        from megatron_mixcpt.config import load_config
        from megatron_mixcpt.errors import ConfigError, MixcptError
        from megatron_mixcpt.files import reason
        from megatron_mixcpt.recall.config import RecallConfig
        from megatron_mixcpt.runtime.launcher import is_distributed, launch

        config = load_config(RecallConfig, args.config, args.overrides)
        shard = parse_shard(args.shard) if args.shard else None
        if args.nproc < 1:
            raise ConfigError(f"--nproc must be at least 1 (got {args.nproc})")
        from megatron_mixcpt.evaluate.loading import quiet_libraries

        quiet_libraries()
        from megatron_mixcpt.recall.asking import Asker
        from megatron_mixcpt.recall.report import fragment
        from megatron_mixcpt.recall.run import check_overlap_paths, explain_missing, recall
        from megatron_mixcpt.runtime.parallel import integer_variable

        stop.check()
        if args.nproc > 1 and not args.assemble and not is_distributed():
            # Mistakes are told before any process starts.
            check_overlap_paths(config)
            Asker(config)
            sharding = ["--shard", args.shard] if args.shard else []
            return launch(args.nproc, ["recall", args.config, *args.overrides, *sharding])
        try:
            summary = recall(
                config,
                rank=integer_variable("RANK", 0),
                world_size=integer_variable("WORLD_SIZE", 1),
                shard=shard,
                assemble=args.assemble,
            )
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise MixcptError(f"{where}{reason(error)}; finished blocks are kept") from error
        if summary is None:
            if shard is not None:
                print(f"shard {args.shard} done")
            return 0
        notes = explain_missing(summary)
        print("\n".join([f"{config.out}: report.md, report.html", *notes, "", fragment(config, summary)]))
    return 0
