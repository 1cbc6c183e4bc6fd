"""`mixcpt study STUDY [--jobs N] [--dry-run] [key=value ...]`."""

from __future__ import annotations

import argparse

NAME = "study"
HELP = """Answer which method, weight and learning rate serve best, for this data and model: every arm of a study at
its own learning rates with one seed, then, at the rate that the study's rule chooses, with all seeds; what each run and
its averages with the base learned and forgot, as study.html, study.md and study.json. Stop it whenever you like: the
same command goes on, on one machine or on several that share the folder. Example: mixcpt study study.yaml --jobs 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file: base, arms, lr, seeds, average, measure, choose, out")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the file's")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on this machine (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and start nothing")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.config import load_config
    from megatron_mixcpt.errors import ConfigError, MixcptError
    from megatron_mixcpt.study.cells import Cells
    from megatron_mixcpt.study.config import Study

    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: at least 1")
    cells = Cells(load_config(Study, args.config, args.overrides), args.config)
    from megatron_mixcpt.study.plan import check, check_devices, foretold

    check_devices(cells.study.nproc, args.jobs)
    check(cells)
    print("\n".join(foretold(cells, args.jobs)), flush=True)
    if args.dry_run:
        return 0
    from megatron_mixcpt.study.run import run_study

    now = run_study(cells, args.jobs)
    print((cells.out / "study.md").read_text())
    if now.failed:
        raise MixcptError(
            f"{len(now.failed)} of {cells.num_runs} runs failed, for reasons in {cells.out / 'study.md'}; what each "
            "printed is in its log.txt. The same command tries them again"
        )
    return 0
