"""The `mixcpt` command.

Each subcommand is a module of `commands/` with NAME, HELP, `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import warnings

from megatron_mixcpt import __version__
from megatron_mixcpt.errors import MixcptError, tell
from megatron_mixcpt.files import FULL, reason
from megatron_mixcpt.quick_import import quicken

# Their modules are imported only when asked for: `mixcpt --help` must not wait for torch.
COMMANDS = {
    "preprocess": "tokenize and pack raw text into a mixed dataset",
    "mix": "re-mix prepared data without tokenizing or copying",
    "verify": "check prepared data down to its source",
    "inspect": "show stored sequences as coloured text",
    "doctor": "check this machine: libraries, devices, network, limits, disk",
    "plan": "what a configuration would take: memory a rank, tokens, hours, disk",
    "rehearse": "a run in small on this CPU: same grid, same code",
    "certify": "prove that the trainer computes the right thing, in a run's settings",
    "certify-loss": "hold any vocabulary-parallel loss against the same oracle",
    "launch": "submit a run or a chain of stages to SLURM",
    "train": "train on a mixture, or resume the run",
    "study": "many runs of one question: which method, for this data and model",
    "recall": "let the model write its own rehearsal data",
    "cache-teacher": "compute the teacher's answers once, before training",
    "select": "choose samples for alignment by their score under a model",
    "align": "teach the format with a few samples: SFT or DPO",
    "report": "one HTML page about a run, or several beside each other",
    "checkpoint": "list, verify or prune the checkpoints of a run",
    "data-state": "what a run has consumed of each source",
    "convert": "import a Hugging Face model as a checkpoint",
    "export": "write a run or checkpoint as a Hugging Face directory",
    "eval": "measure what was learned and what was forgotten",
    "average": "average a tuned model with its base, and measure",
    "generate": "continue prompts, for a quick look",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code (see docs/commands.md)."""
    argv = sys.argv[1:] if argv is None else argv
    silence_libraries()
    quicken()
    args = parse(argv)
    try:
        return args.run(args)
    except MixcptError as error:
        tell(error)
        return error.exit_code
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"error: {error.filename or 'a file'}: cannot be written: {reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def silence_libraries() -> None:
    """What they warn each other of (deprecations, Apex and TE, which nothing here needs) is not for the user."""
    for library in (r"megatron\.", r"torch\.", r"megatron_mixcpt\.runtime\.cpu_backend"):
        warnings.filterwarnings("ignore", module=library)


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
    if wanted is not None and wanted not in COMMANDS:
        near = difflib.get_close_matches(wanted, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`mixcpt --help` lists them"
        parser.error(f"{wanted} is no command; {hint}")
    for name, summary in COMMANDS.items():
        if name == wanted:
            module = importlib.import_module(f"megatron_mixcpt.commands.{name.replace('-', '_')}")
            command = commands.add_parser(name, help=summary, description=module.HELP)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        else:
            commands.add_parser(name, help=summary)
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    args, rest = parser.parse_known_args(argv)
    # argparse (before 3.12.7) gives up on key=value after an option: `train train.yaml --nproc 2 train.lr=1e-5`.
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
