"""How a question is put to a model: plainly, as in training without a chat template, or in the model's own template."""

from __future__ import annotations

from typing import Any

from megatron_mixcpt.errors import ConfigError

QUESTION_PREFIX, ANSWER_PREFIX = "Question: ", "\nAnswer:"


def plain_prompt(question: str) -> str:
    """The prompt for `question`; the answer goes on with a space."""
    return f"{QUESTION_PREFIX}{question}{ANSWER_PREFIX}"


def check_chat(tokenizer: Any, name: str) -> None:
    """Raise ConfigError where the tokenizer of the model `name` has no chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(f"{name}: its tokenizer has no chat template; leave out --chat")


def chat_prompt(tokenizer: Any, text: str) -> str:
    """The prompt whose continuation is a chat model's answer to the user's `text`; control tokens are part of it."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
