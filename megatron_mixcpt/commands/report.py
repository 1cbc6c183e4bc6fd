"""`mixcpt report RUN [RUN2 ...] [--out report.html]`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "report"
HELP = """One HTML page about a run, or several beside each other: curves, what was learned and forgotten, mixture,
time, settings that differ, checkpoints. It needs no network and takes runs that are going on or have died. Example:
mixcpt report runs/mixcpt runs/plain --out compare.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories of `mixcpt train`")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first run)")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.observe.run_report import REPORT, write_report

    out = Path(args.out or Path(args.runs[0]) / REPORT)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory: name a file, as {out / REPORT}")
    write_report([Path(run) for run in args.runs], out)
    print(f"report: {out}")
    return 0
