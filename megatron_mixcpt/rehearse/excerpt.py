"""A few short samples of every source of a mixture, as a mixture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_mixcpt.data_prep.format import IndexedWriter, open_indexed
from megatron_mixcpt.data_prep.mix import FILE_NAME, Mix, Split, write_mix

SEQUENCES = 64  # a source, at most


def write_excerpt(mix: Mix, folder: Path, seq_length: int) -> Path:
    """Write the first samples of every source of `mix`, cut to `seq_length` tokens; returns the excerpt's mix.json."""
    folder.mkdir(parents=True)
    sources = tuple(
        replace(
            source,
            train=_cut(source.train, folder, f"{number}-train", seq_length),
            valid=_cut(source.valid, folder, f"{number}-valid", seq_length),
            pairs=(None, None),  # which `mixcpt align` alone reads
        )
        for number, source in enumerate(mix.sources)
    )
    # No tokenizer lies there: the model's vocabulary is the one it needs already.
    tokenizer = replace(mix.tokenizer, path=folder / "tokenizer")
    excerpt = replace(mix, seq_length=seq_length, sources=sources, tokenizer=tokenizer)
    return write_mix(folder / FILE_NAME, excerpt).path


def _cut(split: Split | None, folder: Path, name: str, seq_length: int) -> Split | None:
    if split is None:
        return None
    tokens, flags = open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")
    count = min(len(tokens), SEQUENCES)
    with (
        IndexedWriter(folder / name, tokens.dtype) as out,
        IndexedWriter(folder / f"{name}.flags", flags.dtype) as marks,
    ):
        for index in range(count):
            out.add(np.asarray(tokens[index][:seq_length]))
            marks.add(np.asarray(flags[index][:seq_length]))
        marks.finish()
        digest = out.finish()
    return Split(folder / name, sequences=count, tokens=count * seq_length, content=digest, documents=count)
