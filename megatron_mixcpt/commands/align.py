"""`mixcpt align CONFIG [--nproc N] [key=value ...]`."""

from __future__ import annotations

import argparse

from megatron_mixcpt.commands.train import add_arguments, start

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "align"
HELP = """Teach a model the format with a few samples: `align.method` sft (supervised fine-tuning) or dpo (direct
preference optimization). Everything else is as in `mixcpt train`: the same command resumes, stop signals save and exit
75. For example: mixcpt align dpo.yaml --nproc 2 align.beta=0.05"""


def run(args: argparse.Namespace) -> int:
    return start(NAME, args)
