"""One model, all measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixcpt.demo.format import format_share
from megatron_mixcpt.demo.perplexity import perplexity
from megatron_mixcpt.evaluate.answers import contains_answer, recall
from megatron_mixcpt.evaluate.generate import generate_greedy
from megatron_mixcpt.evaluate.loading import load_directory

MAX_NEW_TOKENS = 16
MIN_NEW_TOKENS = 3
NUM_FORMAT_QUESTIONS = 12


@dataclass(frozen=True)
class Probe:
    """What is measured. `expected[i]` answers `questions[i]` and ends `clozes[i]`; `ask` makes a question a prompt."""

    domain_documents: Sequence[str]
    general_documents: Sequence[str]
    questions: Sequence[str]
    clozes: Sequence[str]
    expected: Sequence[str]
    ask: Callable[[str], str]


def measure(hf_dir: str | Path, probe: Probe, on_progress: Callable[[float, str], None]) -> dict[str, Any]:
    """Measure the model in `hf_dir`, in fp32, greedily, without randomness.

    Returns `domain_ppl` and `general_ppl` (perplexity), `fact_recall` (share of questions whose answer contains the
    expected words), `fact_completion` (the same for beginnings of training sentences), `format_following` (share of
    answers to evenly chosen questions that are one line and then end by themselves), the token counts behind the
    perplexities, and all `answers`. `on_progress` receives the finished share and what is being measured.
    """
    on_progress(0.0, "loading")
    model, tokenizer = load_directory(hf_dir)

    def part(start: float, end: float, name: str) -> Callable[[float], None]:
        return lambda share: on_progress(start + (end - start) * share, name)

    general = perplexity(model, tokenizer, probe.general_documents, on_progress=part(0.0, 0.5, "general perplexity"))
    domain = perplexity(model, tokenizer, probe.domain_documents, on_progress=part(0.5, 0.6, "domain perplexity"))
    length = {"max_new_tokens": MAX_NEW_TOKENS, "min_new_tokens": MIN_NEW_TOKENS}
    prompts = [probe.ask(question) for question in probe.questions]
    answers = generate_greedy(model, tokenizer, prompts, **length, on_progress=part(0.6, 0.75, "questions"))
    completions = generate_greedy(model, tokenizer, probe.clozes, **length, on_progress=part(0.75, 0.9, "completions"))
    every = -(-len(prompts) // NUM_FORMAT_QUESTIONS)
    following = format_share(
        model, tokenizer, prompts[::every], max_new_tokens=MAX_NEW_TOKENS, on_progress=part(0.9, 1.0, "format")
    )
    return {
        "domain_ppl": domain.value,
        "general_ppl": general.value,
        "fact_recall": recall(answers, probe.expected),
        "fact_completion": recall(completions, probe.expected),
        "format_following": following,
        "domain_tokens": domain.num_tokens,
        "general_tokens": general.num_tokens,
        "num_questions": len(probe.questions),
        "answers": [
            {"question": question, "expected": expected, "answer": answer, "right": contains_answer(answer, expected)}
            for question, expected, answer in zip(probe.questions, probe.expected, answers)
        ],
    }
