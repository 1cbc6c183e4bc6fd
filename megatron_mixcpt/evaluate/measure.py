"""Everything that is measured of one model: held-out perplexity, tasks, and facts joined with skills."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.harness import bundled_tasks, check_tasks, run_harness
from megatron_mixcpt.evaluate.prompts import chat_prompt, check_chat, plain_prompt
from megatron_mixcpt.progress import Progress

if TYPE_CHECKING:
    from megatron_mixcpt.evaluate.gci import Answer, Instance

Measured = dict[str, list]
"""`sources`: [SourcePerplexity], `tasks`: [TaskScore], `items`: [Item] of the tasks, `gci`: [GciScore], `gci_answers`:
[Answer]."""


@dataclass(frozen=True)
class EvalSettings:
    """What to measure, and how."""

    mix_path: Path | None = None
    tasks: list[str] = field(default_factory=list)
    gci: str | None = None
    chat: bool = False
    dtype: str = "fp32"
    micro_batch_size: int = 1
    max_samples: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that measures models."""
    parser.add_argument("--mix", metavar="FILE", help="mix.json with the held-out text (default: the run's)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="`bundled` (120 questions that need no network), task YAML files, or names the harness knows",
    )
    parser.add_argument(
        "--gci",
        metavar="FILE",
        help="questions that need a domain fact and a general skill at once (docs/evaluation.md), or "
        "facts[:PEOPLE[:SEED]] for the people of `make demo`",
    )
    parser.add_argument("--chat", action="store_true", help="put the questions of --gci into the model's chat template")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and arithmetic")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--max-samples", type=int, metavar="N", help="sequences a source, and questions a task")


def read_arguments(args: argparse.Namespace, mix_path: Path | None) -> EvalSettings:
    """Raises ConfigError for what cannot be measured, before any model is opened."""
    for name in ("micro_batch_size", "max_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more")
    if mix_path is None and not args.tasks and not args.gci:
        raise ConfigError("nothing to measure: give --mix (a mix.json), --tasks, --gci, or several of them")
    settings = EvalSettings(
        mix_path, args.tasks, args.gci, args.chat, args.dtype, args.micro_batch_size, args.max_samples
    )
    check_questions(settings)
    return settings


def check_questions(settings: EvalSettings) -> None:
    """Raises ConfigError for tasks and questions that cannot be asked."""
    if settings.tasks:
        check_tasks(settings.tasks)
    if settings.gci:
        gci_instances(settings.gci)


def measure_model(
    path: Path, settings: EvalSettings, done: Callable[[Measured], None] = lambda measured: None
) -> Measured:
    """Measure a run, a checkpoint or a Hugging Face directory.

    Args:
        done: called after each part with all that has been measured so far.

    Raises ConfigError.
    """
    from megatron_mixcpt.data.mix import open_mix
    from megatron_mixcpt.evaluate.held_out import validation_perplexity
    from megatron_mixcpt.evaluate.target import as_hf_directory

    measured: Measured = {"sources": [], "tasks": [], "items": [], "gci": [], "gci_answers": []}
    if settings.mix_path is not None:
        measured["sources"] = validation_perplexity(
            path,
            open_mix(settings.mix_path),
            dtype=settings.dtype,
            micro_batch_size=settings.micro_batch_size,
            max_samples=settings.max_samples,
        )
        done(measured)
    if settings.tasks or settings.gci:
        with as_hf_directory(path) as folder:
            if settings.tasks:
                tasks = [name for task in settings.tasks for name in (bundled_tasks() if task == "bundled" else [task])]
                with Progress(f"{path.name}: tasks", len(tasks), "tasks") as progress:
                    measured["tasks"], measured["items"] = run_harness(
                        folder, tasks, limit=settings.max_samples, dtype=settings.dtype, done=progress.advance
                    )
                done(measured)
            if settings.gci:
                from megatron_mixcpt.evaluate.gci import summarize

                measured["gci_answers"] = _answers(folder, gci_instances(settings.gci), path.name, settings)
                measured["gci"] = summarize(measured["gci_answers"])
                done(measured)
    return measured


def check_models(paths: Sequence[Path], settings: EvalSettings, *, allow_older: bool = False) -> None:
    """Raise what measuring these models would, as far as it can be told without their weights.

    Args:
        allow_older: see `find_checkpoint`.
    """
    from megatron_mixcpt.data.mix import open_mix
    from megatron_mixcpt.evaluate.held_out import check_vocabulary
    from megatron_mixcpt.evaluate.target import architecture_of

    mix = open_mix(settings.mix_path) if settings.mix_path is not None else None
    for path in paths:
        arch = architecture_of(path, allow_older=allow_older)
        if mix is not None:
            check_vocabulary(path, arch, mix)


def gci_instances(text: str) -> list[Instance]:
    """The value of `--gci`: instances of a file, or of the demo's people. Raises ConfigError."""
    from megatron_mixcpt.evaluate.gci import read_instances
    from megatron_mixcpt.evaluate.gci_facts import facts_instances

    if text.split(":")[0] != "facts":
        return read_instances(Path(text))
    try:
        return facts_instances(text)
    except ValueError as error:
        raise ConfigError(f"--gci {text}: {error}") from None


def _answers(folder: Path, instances: list[Instance], name: str, settings: EvalSettings) -> list[Answer]:
    from megatron_mixcpt.evaluate.gci import run_gci

    with Progress(f"{name}: answering", len(instances), "questions") as progress:
        return run_gci(
            folder,
            instances,
            ask=_asking(folder, settings.chat),
            special_tokens=not settings.chat,
            dtype=settings.dtype,
            on_progress=lambda share: progress.reach(share * len(instances)),
        )


def _asking(folder: Path, chat: bool) -> Callable[[str], str]:
    if not chat:
        return plain_prompt
    from transformers import AutoTokenizer

    from megatron_mixcpt.huggingface.gguf import gguf_option

    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf_option(folder))
    check_chat(tokenizer, str(folder))
    return partial(chat_prompt, tokenizer)
