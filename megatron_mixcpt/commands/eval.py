"""`mixcpt eval RUN_OR_HF [--mix MIX] [--base HF] [--tasks TASK ...] [--gci FILE] --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mixcpt.commands.options import add_allow_older
from megatron_mixcpt.evaluate import measure

NAME = "eval"
HELP = """Measure a run, a checkpoint or a Hugging Face directory, and what changed against the model it started from:
perplexity of every source's held-out text, tasks of the lm-evaluation-harness, and questions that need a domain fact
and a general skill at once. Writes eval.json and eval.md. Example:
`mixcpt eval runs/medquad --tasks bundled --gci questions.jsonl --out runs/medquad/eval`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_HF", help="run directory, checkpoint or Hugging Face directory")
    parser.add_argument("--base", metavar="HF", help="model to compare with (default: what the run started from)")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for eval.json and eval.md")
    add_allow_older(parser)
    measure.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.data.mix import open_mix
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.evaluate.comparison import write_comparison
    from megatron_mixcpt.evaluate.loading import quiet_libraries
    from megatron_mixcpt.evaluate.target import is_hf_directory
    from megatron_mixcpt.hf_alora import is_alora

    model, base, mix_path = Path(args.model), args.base and Path(args.base), args.mix and Path(args.mix)
    if is_alora(model):
        raise ConfigError(f"{model} is an adapter alone: evaluate the run that it was exported from")
    if not is_hf_directory(model):
        from megatron_mixcpt.checkpoint.origin import find_origin

        origin = find_origin(model, allow_older=args.allow_older)
        if args.allow_older:
            model = origin.checkpoint
        base = base or origin.base
        mix_path = mix_path or (Path(origin.config.data.mix) if origin.config else None)
    what = measure.read_arguments(args, mix_path)
    quiet_libraries()
    measured = {"model": measure.measure_model(model, what)}
    if base:
        measured["base"] = measure.measure_model(base, what)
    known = {source.name for source in measured["model"]["sources"]}
    unmeasured = [source.name for source in open_mix(mix_path).sources if source.name not in known] if mix_path else []
    write_comparison(
        Path(args.out), measured, model=str(model), base=str(base) if base else None, unmeasured=unmeasured
    )
    print((Path(args.out) / "eval.md").read_text())
    return 0
