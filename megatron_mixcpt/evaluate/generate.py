"""Greedy answers to many prompts, in batches, and how sure the model was of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mixcpt.huggingface.metadata import end_ids


@dataclass(frozen=True)
class Said:
    """One answer. `sure`: mean log-probability of its tokens, its end among them, in nats; of its first line alone."""

    text: str
    sure: float


def generate_greedy(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[str]:
    """The answers of `say`, as text alone; takes the same options."""
    return [said.text for said in say(model, tokenizer, prompts, **options)]


@torch.no_grad()
def say(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    special_tokens: bool = False,
    batch_size: int = 16,
    on_progress: Callable[[float], None] | None = None,
) -> list[Said]:
    """The greedy continuation of every prompt, cut at its first line break, in the order of the prompts.

    `min_new_tokens` forbids the end-of-text token at the beginning, so that a model cannot score by staying silent or
    lose by having been tuned to be brief. `special_tokens`: prompts begin as the tokenizer begins a text, with BOS
    where it adds one; not for prompts of a chat template, which has its own. `on_progress` receives the finished share
    (0 to 1).
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    encoded = [tokenizer(prompts[i], add_special_tokens=special_tokens)["input_ids"] for i in order]
    ends = {*end_ids(tokenizer.eos_token_id), *end_ids(model.generation_config.eos_token_id)}
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = [Said("", 0.0)] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = encoded[start : start + batch_size]
        longest = max(map(len, rows))
        # Padding goes to the left: generation continues from the last column of every row.
        tokens = torch.tensor([[fill] * (longest - len(row)) + row for row in rows])  # [b, s]
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        steps: list[torch.Tensor] = []  # log-probability of each step's choice, [b]

        def record(ids: torch.Tensor, scores: torch.Tensor, steps: list = steps) -> torch.Tensor:
            steps.append(scores.float().log_softmax(-1).amax(-1))
            return scores

        output = model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            pad_token_id=fill,
            logits_processor=[record],
        )
        chosen = torch.stack(steps, 1).tolist()
        for i, ids, sure in zip(order[start : start + batch_size], output[:, longest:].tolist(), chosen):
            answers[i] = _said(tokenizer, ids, sure, ends)
        if on_progress:
            on_progress(min(1.0, (start + batch_size) / len(order)))
    return answers


def _said(tokenizer: Any, ids: list[int], sure: list[float], ends: set[int]) -> Said:
    text = (tokenizer.decode(ids, skip_special_tokens=True).strip().splitlines() or [""])[0].strip()
    count = next((place for place, token in enumerate(ids, start=1) if token in ends), len(ids))
    for length in range(1, count):
        if "\n" in tokenizer.decode(ids[:length], skip_special_tokens=True).lstrip():
            count = length
    return Said(text, sum(sure[:count]) / count)
