"""`mixcpt generate`: a quick look at what a model says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_mixcpt.commands.options import add_allow_older
from megatron_mixcpt.progress import Progress

NAME = "generate"
HELP = """Continue prompts with a run, a checkpoint or a Hugging Face directory. Prompts come from --prompt, or line
by line from standard input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_HF", help="run directory, checkpoint or Hugging Face directory")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, where the temperature is above 0")
    add_allow_older(parser)
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _temperature(text: str) -> float:
    if (value := float(text)) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.evaluate.loading import load_directory, quiet_libraries
    from megatron_mixcpt.evaluate.target import as_hf_directory

    quiet_libraries()
    prompts = args.prompt or (line.rstrip("\n") for line in sys.stdin)
    with as_hf_directory(Path(args.model), allow_older=args.allow_older) as folder:
        model, tokenizer = load_directory(folder)
        for number, prompt in enumerate(prompts, 1):
            with Progress(f"prompt {number}", args.max_new_tokens, "tokens") as progress:
                text = continuation(model, tokenizer, prompt, args, _Counter(progress))
            print(text, flush=True)
    return 0


class _Counter:
    """What transformers calls with the prompt, and then with each token that it has generated."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._begun = progress, False

    def put(self, tokens: Any) -> None:
        if self._begun:
            self._progress.advance()
        self._begun = True

    def end(self) -> None:
        """There will be no more."""


def continuation(
    model: Any, tokenizer: Any, prompt: str, args: argparse.Namespace, streamer: _Counter | None = None
) -> str:
    """The prompt and its continuation; in a chat the answer alone.

    Raises:
        ConfigError: --chat, and the tokenizer has no chat template.
    """
    import torch

    from megatron_mixcpt.errors import ConfigError

    if args.chat:
        if not tokenizer.chat_template:
            raise ConfigError(f"{args.model}: its tokenizer has no chat template; leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A template writes its own control tokens.
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=not args.chat)["input_ids"]
    if tokens.shape[1] == 0:
        raise ConfigError("an empty prompt: this tokenizer begins with nothing, so give at least one character")
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature else {}
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=streamer,
        **(sampling or {"do_sample": False}),
    )[0]
    return tokenizer.decode(output[tokens.shape[1] if args.chat else 0 :], skip_special_tokens=True)
