"""Batched sampling with a key-value cache.

A batch is computed in the same way whenever it is computed: which rows it has is up to the caller, and rows that have
ended leave it by a rule that looks at the batch alone. So what comes out is a function of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.recall.choose import choose

Ending = Literal["end", "limit", "control"]
"""Why a continuation stopped: at an end token, at its length, or at a control token that does not belong there."""
IDLE_SHARE = 0.25  # of a batch's rows that may have ended before they leave it: leaving copies the cache


@dataclass(frozen=True)
class Prompt:
    """What is continued, and the uniform numbers in [0, 1) that decide how: fp64 [longest continuation]."""

    tokens: list[int]
    temperature: float
    uniform: np.ndarray


@dataclass(frozen=True)
class Continuation:
    """`tokens` without the one that ended it; `logprobs` under the model at temperature 1, the ending token's last
    where there is one."""

    tokens: list[int]
    logprobs: list[float]
    ending: Ending


def continue_prompts(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    top_p: float,
    ends: Collection[int],
    controls: Collection[int],
    batch_size: int,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[Continuation]:
    """Continue every prompt until an end token, a control token or the end of its uniform numbers.

    Prompts are sorted by length and computed `batch_size` at a time; the result has their order. `on_tokens` is told
    how many tokens a step made.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    results: list[Continuation | None] = [None] * len(prompts)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        try:
            batch = _Batch(model, [prompts[i] for i in rows], top_p, frozenset(ends), frozenset(controls))
            batch.run(on_tokens)
        except torch.cuda.OutOfMemoryError as error:
            raise MixcptError(
                f"the device has no memory for {len(rows)} samples at a time: lower engine.transformers.batch_size "
                "(`mixcpt plan` shows what a batch takes)"
            ) from error
        for i, result in zip(rows, batch.results):
            results[i] = result
    return [result for result in results if result is not None]


class _Batch:
    """Rows that are computed together."""

    def __init__(
        self, model: Any, prompts: list[Prompt], top_p: float, ends: frozenset[int], controls: frozenset[int]
    ) -> None:
        self._model, self._prompts, self._top_p, self._ends, self._controls = model, prompts, top_p, ends, controls
        self._device = next(model.parameters()).device
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._logprobs: list[list[float]] = [[] for _ in prompts]
        self._endings: list[Ending | None] = [None] * len(prompts)

    @property
    def results(self) -> list[Continuation]:
        """When `run` has returned."""
        return [
            Continuation(tokens, logprobs, ending)
            for tokens, logprobs, ending in zip(self._tokens, self._logprobs, self._endings)
            if ending is not None
        ]

    @torch.inference_mode()
    def run(self, on_tokens: Callable[[int], None]) -> None:
        rows = list(range(len(self._prompts)))  # those in the cache; some may have ended
        longest = max(len(prompt.tokens) for prompt in self._prompts)
        # Padding goes to the left: every row continues from the last column.
        inputs = self._tensor([[0] * (longest - len(p.tokens)) + p.tokens for p in self._prompts])  # [b, s]
        mask = self._tensor([[0] * (longest - len(p.tokens)) + [1] * len(p.tokens) for p in self._prompts])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        uniform = torch.tensor(np.stack([p.uniform for p in self._prompts]), device=self._device)  # fp64 [b, longest]
        temperature = torch.tensor([p.temperature for p in self._prompts], device=self._device)
        cache = None
        for step in range(uniform.shape[1]):
            output = self._model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            place = self._tensor(rows)
            tokens, logp = choose(output.logits[:, -1], temperature[place], self._top_p, uniform[place, step])
            on_tokens(self._take(rows, tokens.tolist(), logp.tolist(), last=step == uniform.shape[1] - 1))
            going = [at for at, row in enumerate(rows) if self._endings[row] is None]
            if not going:
                return
            if len(rows) - len(going) >= IDLE_SHARE * len(rows):
                kept = self._tensor(going)
                cache.batch_select_indices(kept)
                rows = [rows[at] for at in going]
                mask, positions, tokens = mask[kept], positions[kept], tokens[kept]
            inputs = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            positions = positions[:, -1:] + 1

    def _take(self, rows: list[int], tokens: list[int], logp: list[float], *, last: bool) -> int:
        """Note what each row has drawn; returns how many had not ended before."""
        count = 0
        for row, token, value in zip(rows, tokens, logp):
            if self._endings[row] is not None:
                continue
            count += 1
            self._logprobs[row].append(value)
            if token in self._ends:
                self._endings[row] = "end"
            elif token in self._controls:
                self._endings[row] = "control"
            else:
                self._tokens[row].append(token)
                if last:
                    self._endings[row] = "limit"
        return count

    def _tensor(self, values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)
