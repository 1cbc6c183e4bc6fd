"""Perplexity of a causal language model on documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) over `num_tokens` predicted tokens."""

    value: float
    num_tokens: int


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    window: int = 512,
    batch_size: int = 4,
    on_progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """Perplexity over all documents, each read on its own; the mean is over tokens, not over documents.

    A document longer than `window` tokens is cut into windows that overlap by one token, so that every token but the
    first of a document is predicted exactly once. The first token of a document is given, not predicted.
    `on_progress` receives the finished share (0 to 1). Raises ValueError if there is nothing to predict.
    """
    windows = [
        ids[start : start + window + 1]
        for ids in (tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents)
        for start in range(0, len(ids) - 1, window)
    ]
    if not windows:
        raise ValueError("perplexity needs at least one document of two tokens")
    windows.sort(key=len)  # equal lengths share a batch, so little is computed on padding
    total, count = 0.0, 0
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # [b, s], padded on the right
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        logits = model(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1]).logits.float()  # [b, s - 1, v]
        labels = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        total += losses.double().sum().item()
        count += int((labels != -100).sum())
        if on_progress:
            on_progress(min(1.0, (start + batch_size) / len(windows)))
    return Perplexity(math.exp(total / count), count)
