"""Decontamination: records that share a word n-gram with a given evaluation file are flagged, and dropped if asked."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.config import Decontaminate
from megatron_mixcpt.data_prep.inputs import TEXT, resolve_paths
from megatron_mixcpt.data_prep.ngrams import NgramHasher
from megatron_mixcpt.data_prep.parts import hash_file
from megatron_mixcpt.data_prep.plan import scan_file
from megatron_mixcpt.data_prep.readers import read_span
from megatron_mixcpt.data_prep.template import BadRecord
from megatron_mixcpt.errors import ConfigError

NAME = "decontaminate"


def evaluation_key(settings: Decontaminate) -> list[Any]:
    """What flags depend on: n and the content of the evaluation files."""
    return [settings.ngram, [hash_file(path) for path in resolve_paths(settings.paths, NAME)]]


class Detector:
    """Knows the n-grams of the evaluation files."""

    def __init__(self, settings: Decontaminate) -> None:
        """Raises ConfigError if the files hold no text as long as an n-gram, or records that cannot be read."""
        self._hasher = NgramHasher(settings.ngram)
        found = [self._hasher.hashes(text) for text in evaluation_texts(settings.paths)]
        self._known = np.unique(np.concatenate([*found, np.zeros(0, np.uint64)]))
        if not len(self._known):
            raise ConfigError(
                f"decontaminate: no text in {', '.join(settings.paths)} has {settings.ngram} words; lower ngram"
            )

    def contaminated(self, text: str) -> bool:
        """Whether `text` shares an n-gram with the evaluation files."""
        hashes = self._hasher.hashes(text)
        if not len(hashes):
            return False
        at = np.searchsorted(self._known, hashes)
        at[at == len(self._known)] = 0
        return bool((self._known[at] == hashes).any())


def evaluation_texts(patterns: list[str]) -> Iterator[str]:
    """All strings in the records of evaluation files, at any depth; a plain-text file is one string."""
    for path in resolve_paths(patterns, NAME):
        file, spans = scan_file(path, 0, 1 << 22, text_allowed=True)
        for span in spans:
            for line, record in read_span(file, span, 1 << 26):
                if isinstance(record, BadRecord):
                    raise ConfigError(f"decontaminate: {path}:{line}: {record}")
                yield from [record["text"]] if file.format == TEXT else _strings(record)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
