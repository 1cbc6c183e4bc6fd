"""Perplexity against a token-by-token oracle, whatever the batching."""

import math

import pytest
import torch

from megatron_mixcpt.demo.perplexity import perplexity
from tests.evaluate.conftest import hf_dir, model_and_tokenizer

__all__ = ["hf_dir", "model_and_tokenizer"]

DOCUMENTS = [
    "The heron waits.",
    "Water is shallow where the heron stands, and the heron stands where the water is shallow. " * 4,
    "x",
    "A slow afternoon by the river; nothing moves.",
]


def oracle(model, tokenizer, documents, window):
    """Mean of -log p(token | what came before it in its window), one token at a time, in fp64."""
    total, count = 0.0, 0
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for position in range(1, len(ids)):
            start = (position - 1) // window * window
            logits = model(torch.tensor([ids[start:position]])).logits[0, -1].double()
            total -= torch.log_softmax(logits, -1)[ids[position]].item()
            count += 1
    return math.exp(total / count), count


@torch.no_grad()
@pytest.mark.parametrize("window", [7, 32, 512])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_equals_the_oracle(model_and_tokenizer, window, batch_size):
    model, tokenizer = model_and_tokenizer
    result = perplexity(model, tokenizer, DOCUMENTS, window=window, batch_size=batch_size)
    expected, count = oracle(model, tokenizer, DOCUMENTS, window)
    assert result.num_tokens == count
    assert result.value == pytest.approx(expected, rel=1e-5)


def test_progress_rises_to_one(model_and_tokenizer):
    shares = []
    perplexity(*model_and_tokenizer, DOCUMENTS, window=16, batch_size=2, on_progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_nothing_to_predict_is_an_error(model_and_tokenizer):
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(*model_and_tokenizer, ["x"])
