"""`mixcpt eval RUN_OR_HF [--mix MIX] [--base HF] [--tasks TASK ...] [--gci FILE] [--history] --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mixcpt.commands.options import add_allow_older
from megatron_mixcpt.evaluate import measure

NAME = "eval"
HELP = """Measure a run, a checkpoint or a Hugging Face directory, and what changed against the model it started from:
perplexity of every source's held-out text, tasks of the lm-evaluation-harness, and questions that need a domain fact
and a general skill at once; which answers were lost and learned. Writes eval.json, eval.html and eval.md, and keeps
them up to date while it measures; with --history the same of all checkpoints that a run kept, as history.*. Example:
`mixcpt eval runs/medquad --tasks bundled --gci questions.jsonl --out runs/medquad/eval`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_HF", help="run directory, checkpoint or Hugging Face directory")
    parser.add_argument("--base", metavar="HF", help="model to compare with (default: what the run started from)")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for eval.json, eval.html, eval.md")
    parser.add_argument("--overwrite", action="store_true", help="in place of an evaluation that is there already")
    parser.add_argument("--history", action="store_true", help="all checkpoints that a run kept: what went when")
    add_allow_older(parser)
    measure.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.evaluate.evaluation import evaluate
    from megatron_mixcpt.evaluate.history import measure_history
    from megatron_mixcpt.evaluate.target import find_target
    from megatron_mixcpt.hf_alora import is_alora

    if is_alora(Path(args.model)):
        raise ConfigError(f"{args.model} is an adapter alone: evaluate the run that it was exported from")
    target = find_target(args.model, args.base, args.mix, allow_older=args.allow_older)
    settings, out = measure.read_arguments(args, target.mix_path), Path(args.out)
    if not args.history:
        evaluate(target.model, target.base, settings, out, overwrite=args.overwrite)
    elif target.base is None:
        raise ConfigError("--history compares with a base model, and none is known: give --base")
    else:
        measure_history(Path(args.model), target.base, settings, out, overwrite=args.overwrite)
    print((out / ("history.md" if args.history else "eval.md")).read_text())
    return 0
