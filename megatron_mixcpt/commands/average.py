"""`mixcpt average --base A --tuned B --alpha 0.2 0.4 ... --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mixcpt.commands.options import add_allow_older
from megatron_mixcpt.evaluate import measure

NAME = "average"
HELP = """Average the weights of a tuned model with those of the model it started from, (1 - alpha) base + alpha tuned,
for several alphas, and measure all of them in one report: the cheapest way to trade what was learned against what was
forgotten, with which every other should be compared. Example:
`mixcpt average --base models/my-llama --tuned runs/medquad --alpha 0.2 0.4 0.6 0.8 --out runs/medquad/averages`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "run directory, checkpoint or Hugging Face directory"
    parser.add_argument("--base", metavar="A", help=f"{kinds} (default: what the tuned run started from)")
    parser.add_argument("--tuned", required=True, metavar="B", help=kinds)
    parser.add_argument("--alpha", required=True, nargs="+", type=float, metavar="X", help="shares of the tuned model")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for alpha-X/ and the report average.*")
    add_allow_older(parser)
    measure.add_arguments(parser)
    parser.add_argument("--no-eval", action="store_true", help="write the models and measure nothing")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.evaluate.averages import average_models
    from megatron_mixcpt.evaluate.target import find_target

    target = find_target(args.tuned, args.base, args.mix, allow_older=args.allow_older)
    if target.base is None:
        raise ConfigError(f"--base: {target.model} does not say what it started from: name that model")
    settings, out = None if args.no_eval else measure.read_arguments(args, target.mix_path), Path(args.out)
    alphas = list(dict.fromkeys(args.alpha))
    average_models(target.base, target.model, alphas, out, settings, allow_older=args.allow_older)
    if settings is not None:
        print((out / "average.md").read_text())
    return 0
