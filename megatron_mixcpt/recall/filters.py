"""What is wrong with a sample, seen alone. The first reason that applies is the one that counts."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.ngrams import NgramHasher
from megatron_mixcpt.recall.asking import Asker
from megatron_mixcpt.recall.config import INSTRUCTIONS, Filters
from megatron_mixcpt.recall.language import language
from megatron_mixcpt.recall.store import Sample

REASONS = ("unfinished", "control token", "length", "repetition", "language", "unlikely", "near duplicate", "overlap")
"""In the order in which they are looked for."""
REPEATED_NGRAM = 4  # tokens


@dataclass(frozen=True)
class Rejection:
    """Why a sample is left out: a countable reason, and what exactly."""

    reason: str
    detail: str


def texts_of(stream: str, sample: Sample) -> list[str]:
    """Instruction and answer, or the text, without white space around them; an answer that was never asked for is
    empty."""
    texts = [piece["text"].strip() for piece in sample["parts"]]
    return texts if stream != INSTRUCTIONS or len(texts) == 2 else [*texts, ""]


def perplexity(piece: dict[str, Any]) -> float | None:
    """Of what the model wrote, under itself at temperature 1; None where the engine did not tell."""
    logprobs = piece["logprobs"]
    return math.exp(-sum(logprobs) / len(logprobs)) if logprobs else None


class Judge:
    """Applies the filters that need one sample alone."""

    def __init__(self, settings: Filters, asker: Asker) -> None:
        self._settings, self._asker = settings, asker
        self._words = NgramHasher(REPEATED_NGRAM)

    def reject(self, stream: str, sample: Sample) -> Rejection | None:
        """Why a sample is left out, or None."""
        parts, texts = sample["parts"], texts_of(stream, sample)
        names = ("instruction", "answer") if stream == INSTRUCTIONS else ("text",)
        settings = self._settings
        for name, piece in zip(names, parts):
            if piece["ending"] == "limit" and (stream in settings.unfinished or name == "instruction"):
                return Rejection("unfinished", f"the {name} reached its length limit")
        for name, piece, text in zip(names, parts, texts):
            if piece["ending"] == "control":
                return Rejection("control token", f"the {name} ends in a control token of another place")
            if wrong := self._wrong_character(text):
                return Rejection("control token", f"the {name} holds {wrong}")
        for name, piece, text in zip(names, [*parts, None], texts):
            least = getattr(settings, f"min_{name}_tokens")
            count = self._num_tokens(piece, text)
            if count < least or not text:
                return Rejection("length", f"the {name} has {count} tokens, at least {max(least, 1)} are wanted")
        for name, piece, text in zip(names, parts, texts):
            share = self._repetition(piece, text)
            if share > settings.max_repetition:
                return Rejection("repetition", f"{share:.0%} of the {name}'s 4-grams repeat an earlier one")
        if settings.languages:
            spoken = language("\n".join(texts))
            if spoken is not None and spoken not in settings.languages:
                return Rejection("language", f"looks like {spoken}")
        likely = perplexity(parts[-1])
        if likely is not None and likely > settings.max_perplexity:
            return Rejection("unlikely", f"the {names[-1]} has a perplexity of {likely:.1f} under the model itself")
        return None

    def _wrong_character(self, text: str) -> str | None:
        if self._asker.spells_control(text):
            return "the spelling of a control token"
        for character in text:
            if character == "\ufffd":
                return "bytes that are no character"
            if unicodedata.category(character) in ("Cc", "Co", "Cs") and character not in "\n\t\r":
                return f"the control character U+{ord(character):04X}"
        return None

    def _num_tokens(self, piece: dict[str, Any] | None, text: str) -> int:
        if piece is None or not text:
            return 0
        return len(piece["tokens"]) if piece["tokens"] is not None else len(self._asker.encode(text))

    def _repetition(self, piece: dict[str, Any], text: str) -> float:
        """Share of 4-grams that are repeats: of tokens where they are known, else of words."""
        if piece["tokens"] is None:
            grams = self._words.hashes(text)
        else:
            tokens = np.asarray(piece["tokens"], dtype=np.int64)
            if len(tokens) < REPEATED_NGRAM:
                return 0.0
            grams = np.lib.stride_tricks.sliding_window_view(tokens, REPEATED_NGRAM)
        return 1.0 - len(np.unique(grams, axis=0)) / len(grams) if len(grams) else 0.0
