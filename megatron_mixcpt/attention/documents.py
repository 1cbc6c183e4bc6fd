"""Where the documents of a micro-batch lie: what attention needs to know of them, in memory proportional to the tokens.

A document is met as a span: consecutive tokens that are queries on this rank, and the keys that the last of them sees
(from the document's first token up to that one; each earlier query sees one key fewer). Without context parallelism
every document is one span with as many keys as queries.

Shapes: b rows, s tokens of a row, m spans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROW, QUERY, QUERIES, KEY, KEYS = range(5)  # columns of `spans`
SPANS = 64  # from so many on their number is padded to a multiple of it


@dataclass(frozen=True, eq=False)
class Cut:
    """How rows are cut over the ranks of a context-parallel group (see context.py)."""

    size: int
    from_ranks: Tensor  # int64 [s * b]: for each token of the rows, where it is among all ranks' tokens
    to_ranks: Tensor  # int64 [s * b], the inverse


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one micro-batch, made on the CPU: nothing in here ever waits for a device.

    megatron-core hands it to every layer as `packed_seq_params`.
    """

    num_rows: int
    row_length: int
    part_length: int  # tokens of a row that are on this rank: row_length without context parallelism
    spans: np.ndarray  # int32 [m, 5], sorted: row, first query in the rank's part, queries, first key in the row, keys
    cu_queries: Tensor  # int32 [M + 1] where each span begins among all queries, rows one after another, and the end
    cu_keys: Tensor  # int32 [M + 1], the same among all keys; M is m rounded up to a power of two, by empty spans
    key_order: Tensor | None = None  # int64, keys of all spans among [b * s]; None: they are all keys in order
    cut: Cut | None = None  # over the ranks of a context-parallel group

    qkv_format = "sbhd"  # megatron-core's name for tensors [s, b, n, d]

    @classmethod
    def of(cls, doc_start: Tensor) -> Documents:
        """doc_start: bool `[b, s]`, true at the first token of every document; a row's first always starts one."""
        b, s = doc_start.shape
        return cls.from_begins(document_begins(doc_start), np.broadcast_to(np.arange(s), (b, s)))

    @classmethod
    def whole(cls, num_rows: int, row_length: int) -> Documents:
        """Every row is a single document."""
        return cls.of(torch.zeros(num_rows, row_length, dtype=torch.bool))

    @classmethod
    def from_begins(cls, begins: np.ndarray, places: np.ndarray, cut: Cut | None = None) -> Documents:
        """begins: int `[b, s]`, where the document of each token begins; places: `[b, part]`, tokens on this rank."""
        rows = [_row_spans(row, begin, place) for row, (begin, place) in enumerate(zip(begins, places))]
        spans = np.concatenate(rows).astype(np.int32)
        cu_queries, cu_keys = _padded_sums(spans[:, QUERIES]), _padded_sums(spans[:, KEYS])
        b, s = begins.shape
        order = None if cut is None else torch.from_numpy(_keys(spans, s))
        return cls(b, s, places.shape[1], spans, cu_queries, cu_keys, order, cut)

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 `[b, s]`, where the document of each token begins; of whole rows only."""
        assert self.part_length == self.row_length
        flat = np.repeat(self.spans[:, KEY].astype(np.int64), self.spans[:, QUERIES])
        return flat.reshape(self.num_rows, self.row_length)

    @property
    def are_rows(self) -> bool:
        """Whether every row is a single document, all of it on this rank: plain causal attention."""
        return len(self.spans) == self.num_rows and self.part_length == self.row_length

    @property
    def max_queries(self) -> int:
        return int(self.spans[:, QUERIES].max())

    @property
    def max_keys(self) -> int:
        return int(self.spans[:, KEYS].max())

    def position_ids(self) -> Tensor:
        """int64 `[b, s]` of whole rows, counting from 0 in each document."""
        return torch.from_numpy(np.arange(self.row_length) - self.begins)

    def lengths(self) -> Tensor:
        """int64 `[b, s]` of whole rows, tokens of the document that each token is of."""
        assert self.part_length == self.row_length
        queries = self.spans[:, QUERIES].astype(np.int64)
        return torch.from_numpy(np.repeat(queries, queries).reshape(self.num_rows, self.row_length))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Documents:
        sums = replace(self, cu_queries=function(self.cu_queries), cu_keys=function(self.cu_keys))
        if self.cut is None or self.key_order is None:
            return sums
        cut = replace(self.cut, from_ranks=function(self.cut.from_ranks), to_ranks=function(self.cut.to_ranks))
        return replace(sums, key_order=function(self.key_order), cut=cut)

    def plan(self, key: Any, make: Callable[[Documents], Any]) -> Any:
        """What `make` derives from the documents for all layers, kept under `key`."""
        if key not in self._plans:
            self._plans[key] = make(self)
        return self._plans[key]

    @cached_property
    def _plans(self) -> dict[Any, Any]:
        return {}


def document_begins(doc_start: Tensor) -> np.ndarray:
    """bool `[b, s]` as in `Documents.of` -> int64 `[b, s]`, where the document of each token begins."""
    steps = np.arange(doc_start.shape[1])
    return np.maximum.accumulate(np.where(doc_start.cpu().numpy(), steps, 0), axis=1)


def _row_spans(row: int, begins: np.ndarray, places: np.ndarray) -> np.ndarray:
    """int `[m, 5]` of one row: begins `[s]`, places `[part]`."""
    begin = begins[places]
    new = np.ones(len(places), dtype=bool)
    new[1:] = (np.diff(places) != 1) | (np.diff(begin) != 0)
    first = new.nonzero()[0]
    queries = np.diff(np.append(first, len(places)))
    keys = places[first] + queries - begin[first]
    return np.stack([np.full(len(first), row), first, queries, begin[first], keys], axis=1)


def _keys(spans: np.ndarray, row_length: int) -> np.ndarray:
    """int64, the keys of all spans one after another, counted over the rows."""
    keys = spans[:, KEYS].astype(np.int64)
    begins = spans[:, ROW].astype(np.int64) * row_length + spans[:, KEY]
    return np.arange(keys.sum()) + np.repeat(begins - (np.cumsum(keys) - keys), keys)


def _padded_sums(lengths: np.ndarray) -> Tensor:
    """Few shapes occur, whatever the number of documents: powers of two, then multiples, since in backward every span,
    an empty one too, takes scratch memory."""
    size = 1 << (len(lengths) - 1).bit_length()
    if size > SPANS:
        size = -(-len(lengths) // SPANS) * SPANS
    sums = np.zeros(size + 1, dtype=np.int32)
    sums[1 : len(lengths) + 1] = np.cumsum(lengths)
    sums[len(lengths) + 1 :] = sums[len(lengths)]
    return torch.from_numpy(sums)
