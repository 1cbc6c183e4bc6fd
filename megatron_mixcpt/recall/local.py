"""Engine transformers: the model in this process.

A block is computed alone, in batches that follow from its own samples, with a fixed number of threads: so its samples
are the same whoever computes it, and whatever else is computed before or beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.parts import hash_file
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.recall.asking import FIRST, SECOND, Asker, generator
from megatron_mixcpt.recall.config import INSTRUCTIONS, RecallConfig, TransformersEngine
from megatron_mixcpt.recall.draw import answerable, part, sample_of
from megatron_mixcpt.recall.generate import Continuation, Prompt, continue_prompts
from megatron_mixcpt.recall.store import Store


def model_identity(folder: str) -> dict[str, str]:
    """What tells a model from others: numbers of every tensor, and hashes of its smaller files."""
    from megatron_mixcpt.huggingface.weights import weights_fingerprint

    files = [path for path in sorted(Path(folder).iterdir()) if path.suffix in (".json", ".jinja", ".model")]
    return {"weights": weights_fingerprint(folder), **{path.name: hash_file(path) for path in files}}


class LocalEngine:
    """Draws blocks with transformers on this rank's device."""

    def __init__(self, config: RecallConfig, asker: Asker) -> None:
        """Raises ConfigError where the directory holds no model that transformers can open."""
        import torch

        from megatron_mixcpt.evaluate.loading import load_directory
        from megatron_mixcpt.runtime.devices import take_device

        assert config.engine.transformers is not None
        self._config, self._asker = config, asker
        self._settings: TransformersEngine = config.engine.transformers
        self._device = take_device(int(os.environ.get("LOCAL_RANK", "0")))
        if self._device.type == "cpu":
            torch.set_num_threads(self._settings.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self._settings.dtype]
        model, _ = load_directory(config.model.hf, dtype=dtype)
        self._model: Any = model.to(self._device)
        vocabulary = self._model.get_input_embeddings().num_embeddings
        if len(asker.tokenizer) > vocabulary:
            raise ConfigError(
                f"model.hf: the tokenizer of {config.model.hf} has {len(asker.tokenizer)} entries, the model "
                f"{vocabulary}: they do not belong together"
            )

    def draw(self, stream: str, store: Store, block: int, on_tokens: Callable[[int], None]) -> None:
        """Complete a block."""
        asks = [self._asker.ask(stream, number) for number in store.numbers(block)]
        limits = self._config.sampling
        first_limit = limits.max_instruction_tokens if stream == INSTRUCTIONS else limits.max_text_tokens
        firsts = self._continue(
            stream, 0, [(ask.number, ask.tokens, ask.temperature) for ask in asks], first_limit, on_tokens
        )
        samples = [
            sample_of(ask, [self._part(first, ask.tokens[1:] if ask.opening else [])])
            for ask, first in zip(asks, firsts)
        ]
        if stream == INSTRUCTIONS:
            asked = [i for i, sample in enumerate(samples) if answerable(self._asker, sample["parts"][0])]
            wanted = [
                (asks[i].number, self._asker.answer_tokens(samples[i]["parts"][0]["text"]), asks[i].temperature)
                for i in asked
            ]
            answers = self._continue(stream, 1, wanted, limits.max_answer_tokens, on_tokens)
            for i, answer in zip(asked, answers):
                samples[i]["parts"].append(self._part(answer))
        store.complete(block, samples)

    def _continue(
        self,
        stream: str,
        which: int,
        wanted: list[tuple[int, list[int], float]],
        limit: int,
        on_tokens: Callable[[int], None],
    ) -> list[Continuation]:
        """`wanted`: number, prompt and temperature of each sample whose part `which` is to be written."""
        seed = self._config.sampling.seed
        purpose = SECOND if which else FIRST
        prompts = [
            Prompt(tokens, temperature, generator(seed, stream, number, purpose).random(limit, dtype=np.float64))
            for number, tokens, temperature in wanted
        ]
        return continue_prompts(
            self._model,
            prompts,
            top_p=self._config.sampling.top_p,
            ends=self._asker.ends_of(stream, which),
            controls=self._asker.controls,
            batch_size=self._settings.batch_size,
            on_tokens=on_tokens,
        )

    def _part(self, written: Continuation, opening: Sequence[int] = ()) -> dict[str, Any]:
        text = self._asker.decode([*opening, *written.tokens])  # decoded together: a space between them may be lost
        return part(text, written.ending, written.tokens, written.logprobs)
