"""`mixcpt doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "doctor"
HELP = """Check this machine before a run: libraries, devices, collectives, network, limits, clock, and the disk that
runs are written to. Exit code 1 where something would end a run; run it on every node, for example with srun."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="runs", metavar="DIR", help="where runs will be written (default runs)")
    parser.add_argument(
        "--clock", type=float, metavar="SECONDS", help="another machine's `date +%%s`, to compare the clocks with"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.doctor.checks import examine

    signs = {"ok": "ok  ", "note": "note", "problem": "BAD "}
    problems = 0
    for topic, finding in examine(Path(args.dir), args.clock):
        problems += finding.level == "problem"
        print(f"{signs[finding.level]}  {topic:18} {finding.text}")
    print(f"{problems} problems" if problems else "nothing stands in the way")
    return 1 if problems else 0
