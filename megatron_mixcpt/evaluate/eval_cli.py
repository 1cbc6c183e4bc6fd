"""`mixcpt eval RUN_OR_HF [--mix MIX] [--base HF] [--tasks TASK ...] --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "eval"
HELP = """Measure a run, a checkpoint or a Hugging Face directory, and what changed against the model it started from:
perplexity of every source's held-out text, and tasks of the lm-evaluation-harness. Writes eval.json and eval.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_HF", help="run directory, checkpoint or Hugging Face directory")
    parser.add_argument("--base", metavar="HF", help="model to compare with (default: what the run started from)")
    parser.add_argument("--mix", metavar="FILE", help="mix.json with the held-out text (default: the run's)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="`bundled` (120 questions that need no network), task YAML files, or names the harness knows",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for eval.json and eval.md")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and arithmetic")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--max-samples", type=int, metavar="N", help="sequences a source, and questions a task")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.evaluate.comparison import write_comparison
    from megatron_mixcpt.evaluate.loading import quiet_libraries
    from megatron_mixcpt.evaluate.target import is_hf_directory
    from megatron_mixcpt.hf_alora import is_alora

    model, base, mix_path = Path(args.model), args.base and Path(args.base), args.mix and Path(args.mix)
    for name in ("micro_batch_size", "max_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more")
    if is_alora(model):
        raise ConfigError(f"{model} is an adapter alone: evaluate the run that it was exported from")
    if not is_hf_directory(model):
        from megatron_mixcpt.model.origin import find_origin

        origin = find_origin(model)
        base = base or origin.base
        mix_path = mix_path or (Path(origin.config["data"]["mix"]) if origin.config else None)
    if mix_path is None and not args.tasks:
        raise ConfigError("nothing to measure: give --mix (a mix.json), --tasks, or both")
    quiet_libraries()
    measured = {"model": _measure(model, mix_path, args)}
    if base:
        measured["base"] = _measure(base, mix_path, args)
    write_comparison(Path(args.out), measured, model=str(model), base=str(base) if base else None)
    print((Path(args.out) / "eval.md").read_text())
    return 0


def _measure(path: Path, mix_path: Path | None, args: argparse.Namespace) -> dict[str, list]:
    from megatron_mixcpt.data.mix import read_mix
    from megatron_mixcpt.evaluate.harness import bundled_tasks, run_harness
    from megatron_mixcpt.evaluate.target import as_hf_directory
    from megatron_mixcpt.evaluate.validation import validation_perplexity

    measured: dict[str, list] = {"sources": [], "tasks": []}
    if mix_path is not None:
        measured["sources"] = validation_perplexity(
            path,
            read_mix(mix_path),
            dtype=args.dtype,
            micro_batch_size=args.micro_batch_size,
            max_samples=args.max_samples,
        )
    if args.tasks:
        tasks = [name for task in args.tasks for name in (bundled_tasks() if task == "bundled" else [task])]
        with as_hf_directory(path) as folder:
            measured["tasks"] = run_harness(folder, tasks, limit=args.max_samples, dtype=args.dtype)
    return measured
