"""Greedy answers to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.no_grad()
def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    batch_size: int = 16,
    on_progress: Callable[[float], None] | None = None,
) -> list[str]:
    """The greedy continuation of every prompt, cut at its first line break, in the order of the prompts.

    `min_new_tokens` forbids the end-of-text token at the beginning, so that a model cannot score by staying silent or
    lose by having been tuned to be brief. `on_progress` receives the finished share (0 to 1).
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    encoded = [tokenizer(prompts[i], add_special_tokens=False)["input_ids"] for i in order]
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = encoded[start : start + batch_size]
        longest = max(map(len, rows))
        # Padding goes to the left: generation continues from the last column of every row.
        tokens = torch.tensor([[fill] * (longest - len(row)) + row for row in rows])  # [b, s]
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            pad_token_id=fill,
        )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        for i, text in zip(order[start : start + batch_size], texts):
            answers[i] = (text.strip().splitlines() or [""])[0].strip()
        if on_progress:
            on_progress(min(1.0, (start + batch_size) / len(order)))
    return answers
