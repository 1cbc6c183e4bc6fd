"""Which documents meet the CPU's attention kernel in which call (see cpu.py).

Shapes: s queries of a row on this rank, S keys of a row, b rows; G spans of a call, L their tokens (padded).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_mixcpt.attention.documents import KEY, KEYS, QUERIES, QUERY, ROW, Documents

# Costs of forward and backward, in units of a query that meets a key in one head of 64 channels.
CALL = 12000.0  # of a call, whatever it computes
TOKEN = 15.0  # of bringing a token of such a head into a batch and back
WINDOW_BLOCK = 512  # queries that meet the window before them at a time
MASKED = 1 << 20  # queries times keys of a span with keys before it, up to which a mask is better than two calls


@dataclass(frozen=True)
class Slice:
    """One span where it lies: queries from `query` on and keys from `key` on, of one row."""

    num_rows: int
    row: int
    query: int
    queries: int
    key: int
    keys: int
    merges: bool = False
    """Its keys come before all of its queries, which meet others in an earlier call; else it is causal."""

    @property
    def causal(self) -> bool:
        return not self.merges

    def take_queries(self, x: Tensor) -> Tensor:
        """`[s, b, ...]` -> `[1, L, ...]`."""
        return x[self.query : self.query + self.queries, self.row].unsqueeze(0)

    def take_keys(self, x: Tensor) -> Tensor:
        """`[S, b, ...]` -> `[1, keys, ...]`."""
        return x[self.key : self.key + self.keys, self.row].unsqueeze(0)

    def place(self, buffer: Tensor) -> Tensor:
        """The queries' place `[L, ...]` in a buffer `[s * b + 1, ...]`."""
        return self._rows(buffer)[self.query : self.query + self.queries, self.row]

    def put_queries(self, buffer: Tensor, part: Tensor) -> None:
        """part `[1, L, ...]` into a buffer `[s * b + 1, ...]`."""
        self.place(buffer).copy_(part[0])

    def add_queries(self, buffer: Tensor, part: Tensor) -> None:
        self.place(buffer).add_(part[0])

    def add_keys(self, buffer: Tensor, part: Tensor) -> None:
        self._rows(buffer)[self.key : self.key + self.keys, self.row].add_(part[0])

    def clear_padding(self, part: Tensor) -> Tensor:
        return part

    def _rows(self, buffer: Tensor) -> Tensor:
        return buffer[:-1].view(-1, self.num_rows, *buffer.shape[1:])


@dataclass(frozen=True)
class Gathered:
    """Spans of similar length as one batch. Padding repeats a span's last token: any other could overflow, meeting keys
    that the sum of its own does not include. It is put into the buffer's spare row."""

    queries_from: Tensor  # int64 [G * L] tokens in [s * b]
    queries_to: Tensor  # the same, padding last
    keys_from: Tensor  # int64 [G * keys] tokens in [S * b]
    keys_to: Tensor
    padding: Tensor  # int64, which of the queries are
    size: int  # G
    window: int | None = None
    """None: causal, with as many keys as queries, which are in no other call."""
    before: int = 0
    """Keys before the first query."""

    @property
    def causal(self) -> bool:
        return self.window is None

    def take_queries(self, x: Tensor) -> Tensor:
        """`[s, b, ...]` -> `[G, L, ...]`."""
        return x.flatten(0, 1).index_select(0, self.queries_from).unflatten(0, (self.size, -1))

    def take_keys(self, x: Tensor) -> Tensor:
        """`[S, b, ...]` -> `[G, keys, ...]`."""
        return x.flatten(0, 1).index_select(0, self.keys_from).unflatten(0, (self.size, -1))

    def put_queries(self, buffer: Tensor, part: Tensor) -> None:
        """part `[G, L, ...]` into a buffer `[s * b + 1, ...]`."""
        buffer.index_copy_(0, self.queries_to, part.flatten(0, 1))

    add_queries = put_queries  # which are in no call before this one

    def add_keys(self, buffer: Tensor, part: Tensor) -> None:
        if self.causal:
            buffer.index_copy_(0, self.keys_to, part.flatten(0, 1))
        else:
            buffer.index_add_(0, self.keys_to, part.flatten(0, 1))

    def clear_padding(self, part: Tensor) -> Tensor:
        """Zero where `part`, taken for queries, is padding: such queries must give their keys no gradient."""
        if len(self.padding):
            part.flatten(0, 1).index_fill_(0, self.padding, 0.0)
        return part


Call = Slice | Gathered


def plan_calls(documents: Documents, window: int | None, heads: float) -> list[Call]:
    """The calls for all documents, batches first.

    Args:
        window: a token sees itself and the `window` - 1 before it; None: all of its document.
        heads: query heads, in units of 64 channels.
    """
    spans = documents.spans.astype(np.int64)
    if window is not None:
        return _windowed(documents, spans, window)
    before = spans[:, KEYS] - spans[:, QUERIES]
    masked = (before > 0) & (spans[:, QUERIES] * spans[:, KEYS] <= MASKED)
    with_mask = _windowed(documents, spans[masked], documents.row_length)
    spans, before = spans[~masked], before[~masked]
    own = spans.copy()  # each span's queries with the keys that are the same tokens
    own[:, KEY] += before
    own[:, KEYS] = own[:, QUERIES]
    batches, singles = [], []
    for members in _groups(own[:, QUERIES], heads):
        if len(members) == 1:
            singles += [_slice(documents, span) for span in own[members]]
        else:
            batches.append(_gathered(documents, own[members]))
    later = spans[before > 0]
    later[:, KEYS] -= later[:, QUERIES]
    return [*batches, *with_mask, *singles, *(replace(_slice(documents, span), merges=True) for span in later)]


def _slice(documents: Documents, span: np.ndarray) -> Slice:
    row, query, queries, key, keys = span.tolist()
    return Slice(documents.num_rows, row, query, queries, key, keys)


def _groups(lengths: np.ndarray, heads: float) -> list[np.ndarray]:
    """Members of each call, so that all calls together cost least: those of a length stay together or go alone."""
    order = np.argsort(lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    ends = np.cumsum(counts)
    begins = ends - counts
    alone = counts * (CALL + heads * sizes**2 / 2)
    each = heads * (sizes**2 / 2 + TOKEN * sizes)  # of a document padded to this length
    best, first = np.zeros(len(sizes) + 1), np.full(len(sizes), -1)  # first length of the batch that ends here
    for i in range(len(sizes)):
        costs = best[: i + 1] + CALL + (ends[i] - begins[: i + 1]) * each[i]
        j = int(costs.argmin())
        best[i + 1] = min(costs[j], best[i] + alone[i])
        first[i] = j if costs[j] < best[i] + alone[i] else -1
    groups, i = [], len(sizes) - 1
    while i >= 0:
        if first[i] < 0:
            groups += list(order[begins[i] : ends[i]].reshape(-1, 1))
            i -= 1
        else:
            groups.append(order[begins[first[i]] : ends[i]])
            i = int(first[i]) - 1
    return groups


def _gathered(documents: Documents, spans: np.ndarray, window: int | None = None, before: int = 0) -> Gathered:
    b = documents.num_rows
    queries_from, queries_to, padding = _indices(
        spans[:, ROW], spans[:, QUERY], spans[:, QUERIES], b, documents.part_length
    )
    keys_from, keys_to, _ = _indices(spans[:, ROW], spans[:, KEY], spans[:, KEYS], b, documents.row_length)
    return Gathered(queries_from, queries_to, keys_from, keys_to, padding, len(spans), window, before)


def _indices(
    rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray, num_rows: int, row_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each span's tokens are taken from and put to, and which of them are padding; `[G * longest]`, flat."""
    steps = np.arange(lengths.max())
    inside = steps < lengths[:, None]
    tokens = (begins[:, None] + np.minimum(steps, lengths[:, None] - 1)) * num_rows + rows[:, None]
    targets = np.where(inside, tokens, num_rows * row_length)
    padding = (~inside).reshape(-1).nonzero()[0]
    return torch.from_numpy(tokens.reshape(-1)), torch.from_numpy(targets.reshape(-1)), torch.from_numpy(padding)


def _windowed(documents: Documents, spans: np.ndarray, window: int) -> list[Call]:
    """Blocks of queries with the window before them; those with as many keys before go together."""
    blocks: dict[int, list[list[int]]] = {}
    for row, query, queries, key, keys in spans.tolist():
        for begin in range(0, queries, WINDOW_BLOCK):
            count = min(WINDOW_BLOCK, queries - begin)
            all_before = keys - queries + begin
            before = min(all_before, window - 1)
            block = [row, query + begin, count, key + all_before - before, before + count]
            blocks.setdefault(before, []).append(block)
    return [_gathered(documents, np.array(members), window, before) for before, members in blocks.items()]
