"""`mixcpt verify DIR`: is the prepared data exactly what it claims to be?"""

import argparse
import os

from megatron_mixcpt.commands.options import not_negative
from megatron_mixcpt.errors import VerificationError

NAME = "verify"
HELP = "check prepared data: hashes, flags, boundaries, Megatron's reader, and a sample back to its source"
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("data", help="folder with mix.json, or the mix.json itself")
    parser.add_argument(
        "--sample", type=not_negative, default=64, metavar="N", help="records to trace to their source (64)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; raises VerificationError (exit code 3) if anything is wrong."""
    from megatron_mixcpt.data_prep.verify import verify

    findings = verify(args.data, sample=args.sample, workers=len(os.sched_getaffinity(0)))
    for note in findings.notes:
        print(f"note: {note}")
    if findings.problems:
        more = len(findings.problems) - SHOWN
        shown = "\n  ".join(findings.problems[:SHOWN]) + (f"\n  and {more} more" if more > 0 else "")
        raise VerificationError(f"{len(findings.problems)} problems in {args.data}:\n  {shown}")
    print(
        f"verified: {findings.num_files} files, {findings.num_bytes / 1e6:.1f} MB, {findings.num_prefixes} prefixes, "
        f"{findings.num_tokens} tokens, {findings.num_records} records traced to their source, "
        f"{findings.num_bytes / max(findings.seconds, 1e-9) / 1e6:.0f} MB/s"
    )
    return 0
