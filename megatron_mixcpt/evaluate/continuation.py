"""What a model says to one prompt: what `mixcpt generate` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.prompts import chat_prompt
from megatron_mixcpt.progress import Progress


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy and needs no `seed`."""

    max_new_tokens: int
    temperature: float
    seed: int


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


def continue_prompt(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling, *, chat: bool, progress: Progress
) -> str:
    """The prompt and its continuation; in a chat the answer alone. `progress` counts new tokens.

    Raises ConfigError for a prompt without a token.
    """
    text = chat_prompt(tokenizer, prompt) if chat else prompt
    # A template writes its own control tokens.
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]  # [1, s]
    if tokens.shape[1] == 0:
        raise ConfigError("an empty prompt: this tokenizer begins with nothing, so give at least one character")
    torch.manual_seed(sampling.seed)
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=_Counter(progress),
        **how,
    )[0]
    return tokenizer.decode(output[tokens.shape[1] if chat else 0 :], skip_special_tokens=True)
