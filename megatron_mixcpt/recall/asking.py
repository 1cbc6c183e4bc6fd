"""What the model is given for each sample, and what ends it: its tokenizer, its template, the openings.

A sample is addressed by its stream and number. Everything that is drawn for it comes from generators seeded with
(seed, stream, number, purpose), so that it does not depend on which samples are drawn beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.chat import compile_chat_template
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.recall.config import INSTRUCTIONS, RecallConfig

PLACES = ("MIXCPTINSTRUCTION", "MIXCPTANSWER")
SETTINGS, FIRST, SECOND = range(3)
"""Purposes of a sample's generators: how it is asked for, the tokens of its first part, those of its second."""
STREAM_NUMBERS = {"instructions": 0, "text": 1}


def generator(seed: int, stream: str, number: int, purpose: int) -> np.random.Generator:
    """Random numbers of one sample for one purpose."""
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence([seed, STREAM_NUMBERS[stream], number, purpose]))
    )


@dataclass(frozen=True)
class Ask:
    """How a sample is begun: `way` is template, start or opening."""

    stream: str
    number: int
    way: str
    opening: str
    temperature: float
    tokens: list[int]


@dataclass(frozen=True)
class Template:
    """The chat template around one instruction and its answer, in tokens."""

    prefix: list[int]
    instruction_ends: frozenset[int]
    answer_ends: frozenset[int]


class Asker:
    """Turns sample numbers into prompts.

    Raises ConfigError where the directory has no tokenizer, or its template or start token cannot do what is asked.
    """

    def __init__(self, config: RecallConfig) -> None:
        self._config = config
        self.tokenizer: Any = open_tokenizer(config.model.hf)
        self.controls = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.controls |= {int(i) for i in self.tokenizer.all_special_ids}
        self.control_strings = sorted(filter(None, self.tokenizer.convert_ids_to_tokens(sorted(self.controls))))
        self.ends = frozenset(_end_tokens(config.model.hf, self.tokenizer))
        self.template = self._read_template() if config.n.instructions else None
        self._start = self._start_token() if config.n.text else 0
        self.text_ends = self.ends | ({self._start} if config.n.text else set())
        self.openings = _openings(config.text.openings_file) if config.n.text and config.text.openings else []

    def ask(self, stream: str, number: int) -> Ask:
        """How sample `number` of a stream begins."""
        settings = generator(self._config.sampling.seed, stream, number, SETTINGS)
        temperatures = self._config.sampling.temperatures
        temperature = float(temperatures[settings.integers(len(temperatures))])
        if stream == INSTRUCTIONS:
            assert self.template is not None
            return Ask(stream, number, "template", "", temperature, self.template.prefix)
        share = self._config.text.openings
        if int((number + 1) * share) == int(number * share):
            return Ask(stream, number, "start", "", temperature, [self._start])
        opening = self.openings[settings.integers(len(self.openings))]
        return Ask(stream, number, "opening", opening, temperature, [self._start, *self.encode(opening)])

    def answer_tokens(self, instruction: str) -> list[int]:
        """The prompt that has an instruction answered."""
        return self.encode(self._render([("user", instruction)], answer=True))

    def ends_of(self, stream: str, part: int) -> frozenset[int]:
        """Tokens that end the first (0) or second (1) part of a sample."""
        if stream != INSTRUCTIONS:
            return self.text_ends
        assert self.template is not None
        return self.template.answer_ends if part else self.template.instruction_ends

    def spells_control(self, text: str) -> bool:
        """Whether `text` spells a control token, which a template around it would turn into one."""
        return any(control in text for control in self.control_strings)

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def _laid_out(self) -> Callable[..., str]:
        """Not the tokenizer's own way, which tells templates today's date: the same sample is the same tomorrow."""
        return compile_chat_template(self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map)

    def _render(self, turns: list[tuple[str, str]], *, answer: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = self._laid_out(messages, None, answer)
        except Exception as error:  # whatever a template raises is the template's fault
            raise ConfigError(
                f"model.hf: the chat template of {self._config.model.hf} fails on an ordinary conversation: {error}; "
                "repair it, or set n.instructions: 0 and draw text alone"
            ) from error
        return str(text)

    def _read_template(self) -> Template:
        where = f"model.hf: the chat template of {self._config.model.hf}"
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"model.hf: {self._config.model.hf} has no chat template, so nothing to draw instructions from: set "
                "n.instructions: 0 and draw text, which base models can write"
            )
        whole = self._render([("user", PLACES[0]), ("assistant", PLACES[1])], answer=False)
        if not all(whole.count(place) == 1 for place in PLACES) or not whole.find(PLACES[0]) < whole.find(PLACES[1]):
            raise ConfigError(f"{where} does not write instruction and answer once each, in this order")
        prefix, rest = whole.split(PLACES[0])
        between, after = rest.split(PLACES[1])
        closing = self.encode(between)[:1]
        if not set(closing) & (self.controls | self.ends):
            raise ConfigError(
                f"{where} ends an instruction with {between[:20]!r}, which is no control token: nobody could see where "
                "an instruction of the model ends. Set n.instructions: 0 and draw text"
            )
        last = set(self.encode(after)[:1]) & self.controls
        return Template(self.encode(prefix), frozenset(closing) | self.ends, self.ends | last)

    def _start_token(self) -> int:
        tokenizer, name = self.tokenizer, self._config.text.start_token
        if name is not None:
            number = tokenizer.convert_tokens_to_ids(name)
            if number not in self.controls and number not in self.ends:
                raise ConfigError(
                    f"text.start_token: {name!r} is no control token of {self._config.model.hf}; these are: "
                    + ", ".join(self.control_strings[:20])
                )
            return int(number)
        for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if number is not None and not self._opens_turns(tokenizer.convert_ids_to_tokens(number)):
                return int(number)
        raise ConfigError(
            f"text.start_token: nothing says what a text begins with in {self._config.model.hf} (no bos or eos token "
            "outside of its chat template): name the token that stood between documents; control tokens: "
            + ", ".join(self.control_strings[:20])
        )

    def _opens_turns(self, token: str) -> bool:
        """Whether the chat template writes `token` at every turn: then it does not stand before documents."""
        if not self.tokenizer.chat_template:
            return False
        return self._render([("user", PLACES[0]), ("assistant", PLACES[1])], answer=False).count(token) > 1


def open_tokenizer(folder: str) -> Any:
    """The tokenizer of a Hugging Face directory. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ConfigError(f"model.hf: {folder}: no such directory; give a Hugging Face directory")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.hf: {folder} has no tokenizer that transformers can open: {error}") from error


def _end_tokens(folder: str, tokenizer: Any) -> set[int]:
    """What the model itself ends with: eos of the tokenizer and of its generation settings."""
    from transformers import GenerationConfig

    from megatron_mixcpt.huggingface.metadata import end_ids

    try:
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        named = None
    return {*end_ids(tokenizer.eos_token_id), *end_ids(named)}


def _openings(path: str | None) -> list[str]:
    try:
        text = (
            resources.files("megatron_mixcpt.recall").joinpath("data/openings.txt").read_text()
            if path is None
            else Path(path).read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text.openings_file: {path} cannot be read: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"text.openings_file: {path} holds no opening; write one a line")
    return lines
