"""Tokens on their way to the ranks that have their experts, and back.

One exchange of counts and two of rows a layer, the latter once more in backward. No row is dropped, so messages are as
long as the routers make them: the host waits for the counts once a layer and pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Dispatch:
    """Which rows the ranks of an expert group exchange. Collective to make and in both methods.

    Shapes: n rows of this rank, e experts, r ranks with e/r of them each in order, m rows that the ranks send here.
    """

    def __init__(self, counts: Tensor, group: dist.ProcessGroup) -> None:
        """`counts`: int64 `[e]`, this rank's rows for each expert."""
        self._group = group
        sent = counts.view(group.size(), -1)  # [r, e/r]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=group)
        self._sent, self._received = torch.stack([sent, received]).sum(-1).tolist()
        rows = torch.arange(sum(self._received), device=counts.device)
        run = torch.searchsorted(received.flatten().cumsum(0), rows, right=True)  # of one rank for one expert
        self._order = (run % sent.shape[1]).argsort(stable=True)  # [m], from order of rank to order of expert
        self.counts = received.sum(0)
        """Of what `there` returns, the rows of each of this rank's experts: int64 `[e/r]`."""

    def there(self, rows: Tensor) -> Tensor:
        """`[n, h]`, in the order of the experts -> `[m, h]`, those for this rank's experts, in their order."""
        return _Exchange.apply(rows, self._sent, self._received, self._group)[self._order]

    def back(self, rows: Tensor) -> Tensor:
        """What became of `there`'s result, `[m, h]` -> of the rows that went into it, `[n, h]`."""
        by_rank = torch.empty_like(self._order)
        by_rank[self._order] = torch.arange(len(rows), device=rows.device)
        return _Exchange.apply(rows[by_rank], self._received, self._sent, self._group)


class _Exchange(torch.autograd.Function):
    """Rows in parts of `sent` lengths, one a rank -> those of `received` lengths that come from them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return _exchanged(gradient, *ctx.way_back), None, None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
