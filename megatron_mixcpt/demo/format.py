"""Whether answers have the form that was asked for: one line, and then an end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.no_grad()
def format_share(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    on_progress: Callable[[float], None] | None = None,
) -> float:
    """Share of the prompts whose greedy answer is one line that is not empty and ends with the end-of-text token.

    An answer that is still going on after `max_new_tokens` has not ended. Raises ValueError where nothing is asked.
    """
    if not prompts:
        raise ValueError("format_share needs at least one prompt")
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    good = 0
    for start in range(0, len(prompts), batch_size):
        rows = [
            tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts[start : start + batch_size]
        ]
        longest = max(map(len, rows))
        tokens = torch.tensor([[fill] * (longest - len(row)) + row for row in rows])  # [b, s], padded on the left
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=fill,
        )
        good += sum(_well_formed(tokenizer, row.tolist()) for row in output[:, longest:])
        if on_progress:
            on_progress(min(1.0, (start + batch_size) / len(prompts)))
    return good / len(prompts)


def _well_formed(tokenizer: Any, answer: list[int]) -> bool:
    if tokenizer.eos_token_id not in answer:
        return False
    text = tokenizer.decode(answer[: answer.index(tokenizer.eos_token_id)], skip_special_tokens=True).strip()
    return bool(text) and "\n" not in text
