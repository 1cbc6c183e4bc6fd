"""`mixcpt generate`: a quick look at what a model says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mixcpt.commands.options import add_allow_older, count
from megatron_mixcpt.progress import Progress

NAME = "generate"
HELP = """Continue prompts with a run, a checkpoint or a Hugging Face directory. Prompts come from --prompt, or line
by line from standard input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_HF", help="run directory, checkpoint or Hugging Face directory")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=count, default=64, metavar="N")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, where the temperature is above 0")
    add_allow_older(parser)
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")


def _temperature(text: str) -> float:
    if (value := float(text)) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.evaluate.continuation import Sampling, continue_prompt
    from megatron_mixcpt.evaluate.loading import load_directory, quiet_libraries
    from megatron_mixcpt.evaluate.prompts import check_chat
    from megatron_mixcpt.evaluate.target import as_hf_directory

    quiet_libraries()
    prompts = args.prompt or (line.rstrip("\n") for line in sys.stdin)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.seed)
    with as_hf_directory(Path(args.model), allow_older=args.allow_older) as folder:
        model, tokenizer = load_directory(folder)
        if args.chat:
            check_chat(tokenizer, args.model)
        for number, prompt in enumerate(prompts, 1):
            with Progress(f"prompt {number}", args.max_new_tokens, "tokens") as progress:
                text = continue_prompt(model, tokenizer, prompt, sampling, chat=args.chat, progress=progress)
            print(text, flush=True)
    return 0
