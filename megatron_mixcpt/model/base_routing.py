"""Which experts the base model sends tokens to: how much of it training has changed is where forgetting shows first.

Shapes: k experts of a token.
"""

from __future__ import annotations

from collections import defaultdict, deque

import torch
from torch import Tensor


class BaseRouting:
    """What a teacher that is the base model chose, until the student's routers come to the same tokens.

    The teacher passes through each micro-batch before the student does, and through each layer both take them in the
    same order, whatever the pipeline's schedule and however late the student's pass that counts, its recomputation, is.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Tensor]] = defaultdict(deque)  # by layer

    def keep(self, layer: int, experts: Tensor) -> None:
        """`experts`: int64 `[..., k]` of a micro-batch."""
        self._waiting[layer].append(experts.to(torch.int16))

    def changed(self, layer: int, experts: Tensor) -> tuple[Tensor, int]:
        """Of the choices `experts [..., k]` of the next micro-batch how many the base did not make, a scalar on the
        device, and how many there are."""
        if not self._waiting[layer]:
            return experts.new_zeros(()), 0
        base = self._waiting[layer].popleft()
        kept = (experts.unsqueeze(-1) == base.unsqueeze(-2)).any(-1)
        return (~kept).sum(), kept.numel()

    def clear(self) -> None:
        """Before the passes of a step: what a measuring pass left behind is of other tokens."""
        self._waiting.clear()
