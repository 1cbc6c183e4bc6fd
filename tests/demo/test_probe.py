"""One model, all measurements, each equal to what its own function says."""

import pytest

from megatron_mixcpt.demo.format import format_share
from megatron_mixcpt.demo.perplexity import perplexity
from megatron_mixcpt.demo.probe import MAX_NEW_TOKENS, MIN_NEW_TOKENS, NUM_FORMAT_QUESTIONS, Probe, measure
from megatron_mixcpt.evaluate.answers import contains_answer
from megatron_mixcpt.evaluate.generate import generate_greedy
from tests.evaluate.conftest import hf_dir, model_and_tokenizer

__all__ = ["hf_dir", "model_and_tokenizer"]


def test_measure_agrees_with_its_parts(hf_dir, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    questions = ["Where does the heron stand?", "What waits?"]
    prompts = [f"Q: {question}" for question in questions]
    length = {"max_new_tokens": MAX_NEW_TOKENS, "min_new_tokens": MIN_NEW_TOKENS}
    answers = generate_greedy(model, tokenizer, prompts, **length)
    probe = Probe(
        domain_documents=["The heron stands in the water."],
        general_documents=["The river is slow.", "Nothing moves."],
        questions=questions,
        clozes=["The heron stands in the", "The heron"],
        expected=[answers[0].split()[0] if answers[0].split() else "nothing", "no-such-answer"],
        ask=lambda question: f"Q: {question}",
    )
    shares = []
    result = measure(hf_dir, probe, lambda share, what: shares.append(share))
    assert result["domain_ppl"] == pytest.approx(perplexity(model, tokenizer, probe.domain_documents).value)
    assert result["general_ppl"] == pytest.approx(perplexity(model, tokenizer, probe.general_documents).value)
    assert [row["answer"] for row in result["answers"]] == answers
    assert [row["question"] for row in result["answers"]] == questions
    assert result["fact_recall"] == sum(map(contains_answer, answers, probe.expected)) / 2
    every = prompts[:: -(-len(prompts) // NUM_FORMAT_QUESTIONS)]
    assert result["format_following"] == format_share(model, tokenizer, every, max_new_tokens=MAX_NEW_TOKENS)
    assert shares == sorted(shares) and shares[-1] == 1.0
