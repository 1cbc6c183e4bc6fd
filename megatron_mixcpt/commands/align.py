"""`mixcpt align CONFIG [--nproc N] [key=value ...]`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_mixcpt.commands.train import add_arguments, start

if TYPE_CHECKING:
    from megatron_mixcpt.config import Config
    from megatron_mixcpt.train.task import Recipe

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "align"
HELP = """Teach a model the format with a few samples: `align.method` sft (supervised fine-tuning) or dpo (direct
preference optimization). Everything else is as in `mixcpt train`: the same command resumes, stop signals save and exit
75. For example: mixcpt align dpo.yaml --nproc 2 align.beta=0.05"""


def run(args: argparse.Namespace) -> int:
    def read() -> tuple[Config, Recipe]:
        from megatron_mixcpt.align.config import AlignConfig, recipe_of
        from megatron_mixcpt.config import load_config

        config = load_config(AlignConfig, args.config, args.overrides)
        return config, recipe_of(config)

    return start(NAME, args, read)
