"""Context parallelism: each row cut over the ranks of a group, keys and values gathered in every layer.

Document masks make rings of ranks awkward, and with grouped queries keys and values are small, so every rank gets all
of them and computes the queries of its own tokens (as Llama 3 does, https://arxiv.org/abs/2407.21783, section 3.3.2).
In backward their gradients are summed over the ranks and each keeps those of its tokens.

A row is cut into pieces of equal length, and the pieces are dealt so that the ranks get equal numbers of tokens and
much the same attention to compute: a token costs as much as it has keys.

Shapes: N ranks, s tokens of a row, b rows, g key/value heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_mixcpt.attention.documents import Cut, Documents

PIECES = (4, 2, 1)  # of a row that a rank may have


def deal(packing: Documents, size: int) -> np.ndarray:
    """int64 `[N, b, s / N]`, ascending: the tokens of each row that each rank has. N divides s."""
    b, s = packing.num_rows, packing.row_length
    count = next(count for count in PIECES if s % (size * count) == 0)
    length = s // (size * count)
    keys = np.arange(1, s + 1) - packing.begins  # [b, s]
    costs = keys.reshape(b, size * count, length).sum(2)
    load = np.zeros(size)
    places = np.empty((size, b, s // size), dtype=np.int64)
    for row in range(b):
        pieces: list[list[int]] = [[] for _ in range(size)]
        for piece in np.argsort(-costs[row], kind="stable").tolist():
            rank = min((r for r in range(size) if len(pieces[r]) < count), key=lambda r: load[r])
            pieces[rank].append(piece)
            load[rank] += costs[row, piece]
        for rank in range(size):
            begins = np.sort(pieces[rank]) * length
            places[rank, row] = (begins[:, None] + np.arange(length)).reshape(-1)
    return places


def cut(packing: Documents, rank: int, size: int) -> tuple[Documents, Tensor]:
    """The documents as `rank` meets them, and `[b, s / N]`, the tokens that it has."""
    places = deal(packing, size)
    b, s = packing.num_rows, packing.row_length
    tokens = places.transpose(0, 2, 1) * b + np.arange(b)  # [N, s / N, b], each of [s * b]
    to_ranks = torch.from_numpy(np.ascontiguousarray(tokens).reshape(-1))
    from_ranks = torch.empty_like(to_ranks)
    from_ranks[to_ranks] = torch.arange(s * b)
    part = Documents.from_begins(packing.begins, places[rank], Cut(size, from_ranks, to_ranks))
    return part, torch.from_numpy(places[rank])


def whole_rows(x: Tensor, packing: Documents) -> Tensor:
    """x `[s / N, b, ...]` of each rank -> `[s, b, ...]`. Collective, without gradient."""
    assert packing.cut is not None
    gathered = x.new_empty(packing.cut.size * x.shape[0], *x.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, x.contiguous(), parallel_state.get_context_parallel_group())
    return gathered.flatten(0, 1).index_select(0, packing.cut.from_ranks).unflatten(0, (-1, x.shape[1]))


def summed_part(x: Tensor, packing: Documents) -> Tensor:
    """x `[s, b, ...]` of each rank, summed over the ranks: this rank's tokens `[s / N, b, ...]`. Collective."""
    assert packing.cut is not None
    ordered = x.flatten(0, 1).index_select(0, packing.cut.to_ranks).unflatten(0, (-1, x.shape[1]))
    part = x.new_empty(x.shape[0] // packing.cut.size, *x.shape[1:])
    torch.distributed.reduce_scatter_tensor(part, ordered, group=parallel_state.get_context_parallel_group())
    return part


def gathered_rows(x: Tensor, packing: Documents) -> Tensor:
    """`whole_rows`, with gradient."""
    return _Gathered.apply(x, packing)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Documents) -> Tensor:
        ctx.packing = packing
        return whole_rows(x, packing)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return summed_part(upstream, ctx.packing), None


def context_sum(x: Tensor) -> Tensor:
    """The sum over the ranks of the group, on all of them, each of which then computes the same from it: in backward
    every rank goes on with the gradient as it is."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return x
    return _Sum.apply(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        return upstream


def speaks_for_context() -> bool:
    """Whether what all ranks of the group know alike is counted here."""
    return parallel_state.get_context_parallel_rank() == 0
