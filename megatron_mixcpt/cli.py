"""The `mixcpt` command. Each subcommand is a module with NAME, HELP, `add_arguments(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings

from megatron_mixcpt import __version__
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.files import FULL, reason

# Imported only when asked for: `mixcpt --help` must not wait for torch.
COMMANDS = {
    "preprocess": ("megatron_mixcpt.data_prep.cli", "tokenize and pack raw text into a mixed dataset"),
    "mix": ("megatron_mixcpt.data_prep.mix_cli", "re-mix prepared data without tokenizing or copying"),
    "verify": ("megatron_mixcpt.data_prep.verify_cli", "check prepared data down to its source"),
    "inspect": ("megatron_mixcpt.data_prep.inspect_cli", "show stored sequences as coloured text"),
    "doctor": ("megatron_mixcpt.doctor_cli", "check this machine: libraries, devices, network, limits, disk"),
    "plan": ("megatron_mixcpt.plan_cli", "what a configuration would take: memory a rank, tokens, hours, disk"),
    "rehearse": ("megatron_mixcpt.rehearse.rehearse_cli", "a run in small on this CPU: same grid, same code"),
    "launch": ("megatron_mixcpt.slurm.launch_cli", "submit a run or a chain of stages to SLURM"),
    "train": ("megatron_mixcpt.train.cli", "train on a mixture, or resume the run"),
    "cache-teacher": ("megatron_mixcpt.teacher.cache_cli", "compute the teacher's answers once, before training"),
    "select": ("megatron_mixcpt.align.select_cli", "choose samples for alignment by their score under a model"),
    "align": ("megatron_mixcpt.align.cli", "teach the format with a few samples: SFT or DPO"),
    "report": ("megatron_mixcpt.observe.report_cli", "one HTML page about a run, or several beside each other"),
    "checkpoint": ("megatron_mixcpt.checkpoint.cli", "list, verify or prune the checkpoints of a run"),
    "data-state": ("megatron_mixcpt.data.state_cli", "what a run has consumed of each source"),
    "convert": ("megatron_mixcpt.model.convert_cli", "import a Hugging Face model as a checkpoint"),
    "export": ("megatron_mixcpt.model.export_cli", "write a run or checkpoint as a Hugging Face directory"),
    "eval": ("megatron_mixcpt.evaluate.eval_cli", "measure what was learned and what was forgotten"),
    "average": ("megatron_mixcpt.evaluate.average_cli", "average a tuned model with its base, and measure"),
    "generate": ("megatron_mixcpt.evaluate.generate_cli", "continue prompts, for a quick look"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code (see docs/commands.md)."""
    argv = sys.argv[1:] if argv is None else argv
    # What libraries warn each other of (deprecations, Apex and TE, which nothing here needs) is not for the user.
    for library in (r"megatron\.", r"torch\.", r"megatron_mixcpt\.cpu_backend"):
        warnings.filterwarnings("ignore", module=library)
    args = parse(argv)
    try:
        return args.run(args)
    except MixcptError as error:
        if os.environ.get("RANK", "0") == "0":
            # What was stopped on request says so itself, and is no error.
            print(error if error.exit_code == 75 else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"error: {error.filename or 'a file'}: cannot be written: {reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of a command line without `mixcpt`. Raises SystemExit, with the reason on stderr, where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="mixcpt",
        description="Make a general language model an expert in a domain without making it forget.",
        epilog="Run `mixcpt COMMAND --help` for a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"mixcpt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        if name == wanted:
            module = importlib.import_module(module_name)
            command = commands.add_parser(name, help=summary, description=module.HELP)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        else:
            commands.add_parser(name, help=summary)
    args, rest = parser.parse_known_args(argv)
    # argparse (before 3.12.7) gives up on key=value after an option: `train train.yaml --nproc 2 train.lr=1e-5`.
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
