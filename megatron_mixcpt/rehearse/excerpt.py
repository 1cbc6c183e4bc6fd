"""A few short samples of every source of a mixture, as a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_mixcpt.data_prep.format import DOC_START, TARGET, IndexedWriter, open_indexed
from megatron_mixcpt.data_prep.mix import FILE_NAME, Mix, Split, write_mix

SEQUENCES = 64  # a source, at most

Row = tuple[np.ndarray, np.ndarray]  # tokens and flags of a sequence
Rows = Callable[[Split], Iterable[Row]]


def write_excerpt(mix: Mix, folder: Path, seq_length: int) -> Path:
    """Write the first samples of every source of `mix`, a piece of `seq_length` tokens of each; returns the excerpt's
    mix.json."""
    sources = tuple(replace(source, pairs=(None, None)) for source in mix.sources)  # which `mixcpt align` alone reads
    return write_rows(replace(mix, sources=sources), folder, seq_length, lambda split: _pieces(split, seq_length))


def _pieces(split: Split, length: int) -> Iterator[Row]:
    """The beginnings of the first sequences or, where nothing is learned there (a long prompt), pieces where it is."""
    tokens, flags = open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")
    for index in range(min(len(tokens), SEQUENCES)):
        marks = np.asarray(flags[index])
        begin = 0 if (marks[:length] & TARGET).any() else int(richest(marks, length)[0])
        yield piece(np.asarray(tokens[index]), marks, begin, length)


def richest(flags: np.ndarray, length: int) -> np.ndarray:
    """Where pieces of `length` tokens begin that hold as many targets as any; at 0 in a shorter sequence."""
    targets = np.concatenate([[0], np.cumsum((flags & TARGET) != 0)])
    counts = targets[length:] - targets[:-length]
    return np.flatnonzero(counts == counts.max()) if len(counts) else np.zeros(1, np.int64)


def piece(tokens: np.ndarray, flags: np.ndarray, begin: int, length: int) -> Row:
    """Of a sequence, with its flags, as a sequence of its own."""
    marks = flags[begin : begin + length].copy()
    marks[0] = (marks[0] | DOC_START) & ~np.uint8(TARGET)
    return tokens[begin : begin + length].copy(), marks


def write_rows(mix: Mix, folder: Path, seq_length: int, rows: Rows) -> Path:
    """Write `mix` with the sequences `rows` in place of its own; returns its mix.json."""
    folder.mkdir(parents=True)

    def written(split: Split | None, name: str) -> Split | None:
        return split and _write(rows(split), folder, name)

    sources = tuple(
        replace(
            source,
            train=written(source.train, f"{number}-train"),
            valid=written(source.valid, f"{number}-valid"),
            pairs=(written(source.pairs[0], f"{number}-pairs"), written(source.pairs[1], f"{number}-valid-pairs")),
        )
        for number, source in enumerate(mix.sources)
    )
    # No tokenizer lies there: the model's vocabulary is the one it needs already.
    tokenizer = replace(mix.tokenizer, path=folder / "tokenizer")
    excerpt = replace(mix, seq_length=seq_length, sources=sources, tokenizer=tokenizer)
    return write_mix(folder / FILE_NAME, excerpt).path


def _write(rows: Iterable[Row], folder: Path, name: str) -> Split:
    sequences = list(rows)
    first_tokens, first_flags = sequences[0]
    with (
        IndexedWriter(folder / name, first_tokens.dtype) as out,
        IndexedWriter(folder / f"{name}.flags", first_flags.dtype) as marks,
    ):
        for tokens, flags in sequences:
            out.add(tokens)
            marks.add(flags)
        marks.finish()
        digest = out.finish()
    total = sum(len(tokens) for tokens, _ in sequences)
    return Split(folder / name, sequences=len(sequences), tokens=total, content=digest, documents=len(sequences))
