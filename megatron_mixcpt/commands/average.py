"""`mixcpt average --base A --tuned B --alpha 0.2 0.4 ... --out DIR`."""

from __future__ import annotations

import argparse
import contextlib
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
    from megatron_mixcpt.checkpoint.origin import find_origin
    from megatron_mixcpt.convert.average import average, num_tensors
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.evaluate.averages import write_averages
    from megatron_mixcpt.evaluate.loading import quiet_libraries
    from megatron_mixcpt.evaluate.target import as_hf_directory, is_hf_directory
    from megatron_mixcpt.files import check_writable
    from megatron_mixcpt.progress import Progress

    tuned, base, mix_path = Path(args.tuned), args.base and Path(args.base), args.mix and Path(args.mix)
    if tuned.is_dir() and not is_hf_directory(tuned):
        origin = find_origin(tuned, allow_older=args.allow_older)
        if args.allow_older:
            tuned = origin.checkpoint
        base = base or origin.base
        mix_path = mix_path or (Path(origin.config.data.mix) if origin.config else None)
    if base is None:
        raise ConfigError(f"--base: {tuned} does not say what it started from: name that model")
    settings = None if args.no_eval else measure.read_arguments(args, mix_path)
    out, alphas = Path(args.out), list(dict.fromkeys(args.alpha))
    for alpha in alphas:
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"--alpha {alpha:g}: between 0 (the base model) and 1 (the tuned model)")
    taken = [out / f"alpha-{alpha:g}" for alpha in alphas] + [out / "average.json"] * (settings is not None)
    if there := [path for path in taken if path.exists()]:
        raise ConfigError(f"{there[0]} is there already: give another --out or remove it")
    if settings is not None:
        measure.check_models([base, tuned], settings)
    check_writable(out)
    quiet_libraries()
    models = {"base": base, **{f"{alpha:g}": out / f"alpha-{alpha:g}" for alpha in alphas}, "tuned": tuned}
    paths = {name: str(path) for name, path in models.items()}
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(as_hf_directory(path, allow_older=args.allow_older)) for path in (base, tuned)
        )
        for alpha in alphas:
            with Progress(f"averaging at {alpha:g}", num_tensors(second), "tensors") as progress:
                average(first, second, alpha, out / f"alpha-{alpha:g}", done=lambda name: progress.advance())
        if settings is not None:
            hf, measured = {"base": first, "tuned": second}, {}
            for name, path in models.items():
                measured[name] = measure.measure_model(hf.get(name, path), settings)
                write_averages(out, measured, paths, complete=name == "tuned")
            print((out / "average.md").read_text())
    return 0
