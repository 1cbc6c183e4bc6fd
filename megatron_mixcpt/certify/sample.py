"""Rows of the user's own mixture that show mistakes: several documents in each, targets in each, and padding.

The vocabulary is cut down to the tokens that occur, with as many columns of padding on each tensor rank as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.data_prep.format import DOC_START, PAD, TARGET, open_indexed
from megatron_mixcpt.data_prep.mix import Mix, Split
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.rehearse.excerpt import Row, piece, richest, write_rows

SHARES = (0.4, 0.25, 0.35)  # of a row that its documents take
PADDING = 3  # of a row, at most this part: rows, and so micro-batches, differ in how many tokens count
PAIRS = 3  # of preferences for each row, which takes as many at most


def write_sample(mix: Mix, arch: Architecture, tensor: int, seq_length: int, rows: int, folder: Path) -> Path:
    """Write the mixture of `rows` rows a source, or of preference pairs; returns its mix.json.

    Args:
        mix: as the configuration's kind of training reads it; sources of pairs have them as `pairs`.
        arch: of the real model, whose vocabulary is cut down.
    """
    drawn: dict[Path, list[Row]] = {}
    sources = []
    for source in mix.sources:
        pairs, train = source.pairs[0], source.train
        if pairs is not None:
            drawn[pairs.prefix] = list(_pairs(pairs, seq_length, PAIRS * rows))
        if train is not None:
            drawn[train.prefix] = list(_rows(train, seq_length, rows))
        sources.append(replace(source, train=train, valid=None, pairs=(pairs, None)))
    used = np.unique(np.concatenate([tokens for of in drawn.values() for tokens, _ in of]))
    vocab_size = small_vocabulary(len(used), arch, tensor)
    tokenizer = replace(mix.tokenizer, vocab_size=vocab_size)

    def written(split: Split) -> list[Row]:
        # Spread over the whole vocabulary, so that every rank's part is used.
        spread = np.linspace(0, vocab_size - 1, len(used)).astype(np.int64)
        return [
            (spread[np.searchsorted(used, tokens)].astype(tokens.dtype), flags) for tokens, flags in drawn[split.prefix]
        ]

    return write_rows(replace(mix, sources=tuple(sources), tokenizer=tokenizer), folder, seq_length, written)


def small_vocabulary(used: int, arch: Architecture, tensor: int) -> int:
    """Entries for `used` tokens at least, which leave the padding that the real vocabulary leaves."""
    padded = arch.padded_vocab_size(tensor)
    multiple = replace(arch, vocab_size=1).padded_vocab_size(tensor)
    padding = padded - arch.vocab_size
    return -(-(used + padding) // multiple) * multiple - padding


def _rows(split: Split, length: int, count: int) -> Iterator[Row]:
    """Rows of one piece each of several stored sequences, documents of their own."""
    tokens, flags = open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")
    sizes = [round(share * length) for share in SHARES[:-1]]
    sizes.append(length - sum(sizes))
    drawn = 0
    for row in range(count):
        parts: list[Row] = []
        for size in sizes:
            number, turn = drawn % len(tokens), drawn // len(tokens)
            parts.append(_piece(np.asarray(tokens[number]), np.asarray(flags[number]), size, turn))
            drawn += 1
        whole, marks = np.concatenate([part for part, _ in parts]), np.concatenate([mark for _, mark in parts])
        padding = row * 7 % (length // PADDING)
        if padding:
            whole[-padding:], marks[-padding:] = whole[0], PAD
            marks[-padding] |= DOC_START
        yield whole, marks


def _piece(tokens: np.ndarray, flags: np.ndarray, length: int, turn: int) -> Row:
    """`length` tokens in a row with as many targets as there are, from another place at every turn."""
    if len(tokens) < length:
        raise ConfigError(f"data.mix: sequences of {len(tokens)} tokens are too short for mixcpt certify")
    best = richest(flags, length)
    return piece(tokens, flags, int(best[(turn * length) % len(best)]), length)


def _pairs(split: Split, length: int, count: int) -> Iterator[Row]:
    """Chosen and rejected answers in turn, cut to a few tokens around where an answer begins."""
    tokens, flags = open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")
    for number in range(2 * count):
        stored = number % len(tokens)
        whole, marks = np.asarray(tokens[stored]), np.asarray(flags[stored]).copy()
        first = int(np.flatnonzero(marks & TARGET)[0])
        begin, size = max(first - 4, 0), length // 4 + (number * 5) % (length // 3)
        marks = marks[begin : begin + size] & ~np.uint8(DOC_START)
        marks[0] = (marks[0] | DOC_START) & ~np.uint8(TARGET)
        yield whole[begin : begin + size].copy(), marks
