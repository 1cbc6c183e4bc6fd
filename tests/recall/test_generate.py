"""Batched sampling with a cache against one prompt at a time without one."""

import numpy as np
import pytest
import torch

from megatron_mixcpt.evaluate.loading import load_directory
from megatron_mixcpt.recall.choose import choose
from megatron_mixcpt.recall.generate import Continuation, Prompt, continue_prompts

ENDS, CONTROLS = {2}, {0, 1, 2}


@torch.no_grad()
def oracle(model, prompt, top_p):
    tokens, logprobs = [], []
    for uniform in prompt.uniform:
        logits = model(torch.tensor([prompt.tokens + tokens])).logits[:, -1]
        token, logp = choose(logits, torch.tensor([prompt.temperature]), top_p, torch.tensor([uniform]))
        logprobs.append(logp.item())
        if token.item() in CONTROLS:
            return Continuation(tokens, logprobs, "end" if token.item() in ENDS else "control")
        tokens.append(token.item())
    return Continuation(tokens, logprobs, "limit")


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_sample_equals_the_one_that_is_drawn_alone_without_a_cache(chat_model, batch_size):
    model, _ = load_directory(chat_model)
    generator = np.random.default_rng(0)
    prompts = [
        Prompt(
            generator.integers(3, 300, generator.integers(1, 9)).tolist(),
            float(generator.choice([0.7, 1.0])),
            generator.random(14),
        )
        for _ in range(16)
    ]
    told = []
    found = continue_prompts(
        model, prompts, top_p=0.95, ends=ENDS, controls=CONTROLS, batch_size=batch_size, on_tokens=told.append
    )
    expected = [oracle(model, prompt, 0.95) for prompt in prompts]
    assert [(one.tokens, one.ending) for one in found] == [(one.tokens, one.ending) for one in expected]
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-4)
    assert {one.ending for one in found} >= {"end", "limit"}
    assert sum(told) == sum(len(one.logprobs) for one in found)


def test_a_batch_gives_the_same_bits_whenever_it_is_computed(chat_model):
    model, _ = load_directory(chat_model)
    prompts = [Prompt([5, 6, 7 + i], 1.0, np.random.default_rng(i).random(10)) for i in range(6)]
    settings = dict(top_p=1.0, ends=ENDS, controls=CONTROLS, batch_size=6)
    first = continue_prompts(model, prompts, **settings)
    continue_prompts(model, prompts[:3], **settings)
    assert continue_prompts(model, prompts, **settings) == first
