"""The documents of stored rows, read from their flags alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_mixcpt.data_prep.format import DOC_START, PAD, TARGET, Indexed, kind_of, open_indexed
from megatron_mixcpt.data_prep.mix import read_mix


@dataclass(frozen=True)
class Document:
    """What is trained on as one text.

    Attributes:
        sample, begin: the row it lies in, and its first token there.
        tokens: int64 `[n]`.
        targets: bool `[n]`, tokens whose prediction counts.
        kinds: int64 `[n]`, number of the kind of each.
        is_padding: of a row that its texts do not fill.
    """

    sample: int
    begin: int
    tokens: Tensor
    targets: Tensor
    kinds: Tensor
    is_padding: bool = False


class Rows:
    """The stored sequences of a mixture's training sources: packed text, or with `pairs` preference pairs."""

    def __init__(self, mix: Path, *, pairs: bool) -> None:
        sources = read_mix(mix).sources
        splits = [source.pairs[0] if pairs else source.train for source in sources]
        self._files: list[tuple[Indexed, Indexed]] = [
            (open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")) for split in splits if split
        ]

    def documents(self, samples: Mapping[int, tuple[int, list[int]]], row_length: int | None = None) -> list[Document]:
        """Of each sample (its source, the stored sequences in its row), in order.

        `row_length`: in tokens; where given, what fills a row up is a document too, else padding is none.
        """
        found = []
        for sample, (source, sequences) in sorted(samples.items()):
            tokens, flags = self._files[source]
            row = np.concatenate([tokens[number] for number in sequences]).astype(np.int64)
            marks = np.concatenate([flags[number] for number in sequences])
            if row_length is not None and len(row) < row_length:
                filling = np.full(row_length - len(row), PAD, marks.dtype)
                filling[0] |= DOC_START
                row, marks = np.concatenate([row, np.zeros(len(filling), row.dtype)]), np.concatenate([marks, filling])
            row[(marks & PAD) != 0] = 0  # whatever is stored there
            starts = [*np.flatnonzero(marks & DOC_START).tolist(), len(row)]
            for begin, end in pairwise(starts):
                is_padding = bool(marks[begin] & PAD)
                if not is_padding or row_length is not None:
                    found.append(
                        Document(
                            sample,
                            begin,
                            torch.from_numpy(row[begin:end].copy()),
                            torch.from_numpy((marks[begin:end] & TARGET) != 0),
                            torch.from_numpy(kind_of(marks[begin:end]).astype(np.int64)),
                            is_padding,
                        )
                    )
        return found
