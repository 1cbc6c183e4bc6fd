"""What attention over packed documents is, in a few lines and with all its scores: what tests compare the others with.

Shapes: s sequence, b batch, n query heads, g key/value heads, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mixcpt.attention.documents import document_begins


def dense_mask(doc_start: Tensor, window: int | None = None) -> Tensor:
    """bool `[b, s, s]`, true where a query (second dimension) may attend to a key.

    doc_start: bool `[b, s]`, true at the first token of every document. window: a token sees itself and the `window` -
    1 tokens before it.
    """
    begins = torch.from_numpy(document_begins(doc_start))
    steps = torch.arange(doc_start.shape[1])
    distance = steps.unsqueeze(1) - steps
    near = (distance >= 0) & (distance < (window or len(steps)))
    return (begins.unsqueeze(2) == begins.unsqueeze(1)) & near


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v, in the type of its arguments: query `[s, b, n, d]`, key and value `[s, b, g, d]`, mask
    `[b, s, s]` -> `[s, b, n, d]`."""
    n, d = query.shape[2:]
    key, value = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * (d**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value)
