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
    from megatron_mixcpt.data.mix import open_mix
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.evaluate.comparison import check_unwritten, write_comparison
    from megatron_mixcpt.evaluate.history import measure_history
    from megatron_mixcpt.evaluate.loading import quiet_libraries
    from megatron_mixcpt.evaluate.target import is_hf_directory
    from megatron_mixcpt.files import check_writable
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
    settings = measure.read_arguments(args, mix_path)
    out = Path(args.out)
    if args.history:
        if base is None:
            raise ConfigError("--history compares with a base model, and none is known: give --base")
        measure.check_models([base, model], settings)
        check_writable(out)
        quiet_libraries()
        measure_history(Path(args.model), base, settings, out, overwrite=args.overwrite)
        print((out / "history.md").read_text())
        return 0
    check_unwritten(out, overwrite=args.overwrite)
    measure.check_models([model, *[base] * (base is not None)], settings)
    check_writable(out)
    quiet_libraries()
    measured: dict[str, measure.Measured] = {}

    def write(*, complete: bool) -> None:
        known = {source.name for source in measured["model"]["sources"]}
        names = [source.name for source in open_mix(mix_path).sources if source.name not in known] if mix_path else []
        write_comparison(
            out, measured, model=str(model), base=str(base) if base else None, unmeasured=names, complete=complete
        )

    for name, path in (("model", model), ("base", base)):
        if path:

            def keep(parts: measure.Measured, name: str = name) -> None:
                measured[name] = parts
                write(complete=False)

            measure.measure_model(path, settings, keep)
    write(complete=True)
    print((out / "eval.md").read_text())
    return 0
