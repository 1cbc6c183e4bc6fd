"""A few short samples of every source of a mixture, as a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_mixcpt.data_prep.format import IndexedWriter, open_indexed
from megatron_mixcpt.data_prep.mix import FILE_NAME, Mix, Split, write_mix

SEQUENCES = 64  # a source, at most

Rows = Callable[[Split], Iterable[tuple[np.ndarray, np.ndarray]]]  # tokens and flags of each sequence


def write_excerpt(mix: Mix, folder: Path, seq_length: int) -> Path:
    """Write the first samples of every source of `mix`, cut to `seq_length` tokens; returns the excerpt's mix.json."""
    sources = tuple(replace(source, pairs=(None, None)) for source in mix.sources)  # which `mixcpt align` alone reads
    return write_rows(replace(mix, sources=sources), folder, seq_length, lambda split: beginnings(split, seq_length))


def beginnings(split: Split, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `length` tokens of the first sequences, with their flags."""
    tokens, flags = open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")
    for index in range(min(len(tokens), SEQUENCES)):
        yield np.asarray(tokens[index][:length]), np.asarray(flags[index][:length])


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


def _write(rows: Iterable[tuple[np.ndarray, np.ndarray]], folder: Path, name: str) -> Split:
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
