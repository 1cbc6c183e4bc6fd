"""What a cache keeps of a teacher's logits: the most likely tokens, the label and everything else as one tail.

Shapes: s sequence, b micro-batch, v vocabulary, tp tensor-parallel size, k tokens kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mixcpt.kernels.collectives import Group, all_gather

CHUNK_BYTES = 64 << 20  # of fp32 logits that exist at a time


class Sparse(NamedTuple):
    """fp32, of softmax(logits / temperature); the same on all ranks of the group."""

    ids: Tensor  # [N, k] int64, global, most likely first, the lowest id on ties
    logp: Tensor  # [N, k]
    gold: Tensor  # [N] log-probability of the label
    tail: Tensor  # [N] logarithm of the probability of all tokens that are neither kept nor the label


@torch.no_grad()
def sparsify(
    logits: Tensor,
    labels: Tensor,
    k: int,
    *,
    temperature: float,
    group: Group | None,
    vocab_start: int,
    vocab_size: int,
) -> Sparse:
    """logits `[N, v/tp]` of this rank, labels `[N]` global ids of any token; collective over `group`.

    k is at most `vocab_size`, the entries without padding.
    """
    chunk = max(1, CHUNK_BYTES // (4 * max(logits.shape[-1], 1)))
    parts = [
        _sparsify(rows, gold, k, temperature, group, vocab_start, vocab_size)
        for rows, gold in zip(logits.split(chunk), labels.split(chunk))
    ]
    return Sparse(*(torch.cat(column) for column in zip(*parts)))


def _sparsify(
    logits: Tensor, labels: Tensor, k: int, temperature: float, group: Group | None, vocab_start: int, vocab_size: int
) -> Sparse:
    values = logits.float() / temperature  # [N, v/tp]
    values[:, max(vocab_size - vocab_start, 0) :] = -torch.inf  # padding
    num_tokens, width = values.shape
    top, columns = values.topk(min(k, width), dim=-1)
    if width < k:  # a shard smaller than k has nothing more to offer
        top = torch.nn.functional.pad(top, (0, k - width), value=-torch.inf)
        columns = torch.nn.functional.pad(columns, (0, k - width))
    column = labels - vocab_start
    here = (column >= 0) & (column < width)
    gold = values.gather(-1, column.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1).masked_fill(~here, -torch.inf)
    words = torch.cat([top, values.logsumexp(-1, keepdim=True), gold.unsqueeze(-1)], -1)  # [N, k + 2]
    words = all_gather(words.unsqueeze(0), group)  # [tp, N, k + 2]
    ids = all_gather((columns + vocab_start).unsqueeze(0), group)

    candidates = words[..., :k].transpose(0, 1).reshape(num_tokens, -1)
    ids = ids.transpose(0, 1).reshape(num_tokens, -1)
    by_id = ids.argsort(dim=-1)
    candidates, ids = candidates.gather(-1, by_id), ids.gather(-1, by_id)
    order = candidates.argsort(dim=-1, descending=True, stable=True)[:, :k]
    ids = ids.gather(-1, order)
    normalizer = words[..., k].logsumexp(0)
    logp = candidates.gather(-1, order) - normalizer.unsqueeze(-1)
    gold = words[..., k + 1].amax(0) - normalizer
    outside = (ids != labels.unsqueeze(-1)).all(-1)
    kept = logp.double().exp().sum(-1) + gold.double().exp().masked_fill(~outside, 0)
    tail = (1 - kept).clamp(min=0).log().float() if k < vocab_size else torch.full_like(gold, -torch.inf)
    return Sparse(ids, logp, gold, tail)
