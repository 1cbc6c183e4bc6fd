"""Each filter takes what it is there for, and only that."""

import numpy as np
import pytest

from megatron_mixcpt.config import validate
from megatron_mixcpt.recall.asking import Asker
from megatron_mixcpt.recall.config import Filters, RecallConfig
from megatron_mixcpt.recall.diversity import clusters, distinct_ngrams
from megatron_mixcpt.recall.filters import Judge
from megatron_mixcpt.recall.language import language
from megatron_mixcpt.recall.overlap import shares_found
from tests.recall.models import recall_values

SETTINGS = {"min_instruction_tokens": 2, "min_answer_tokens": 1, "min_text_tokens": 4, "max_perplexity": 20.0}
TEXTS = {
    "en": "The heron stands in the shallow water and waits for a fish that is not there.",
    "de": "Der Reiher steht im flachen Wasser und wartet auf einen Fisch, der nicht da ist.",
    "fr": "Le héron se tient dans les eaux peu profondes et il attend un poisson qui ne vient pas.",
    "es": "La garza está en el agua poco profunda y espera un pez que no llega a la orilla.",
    "ru": "Цапля стоит в мелкой воде и ждёт рыбу, которой там нет, но она не уходит.",
    "zh": "苍鹭站在浅水中等待一条并不存在的鱼",
    "ja": "サギは浅い水の中に立って、いない魚を待っています",
    "ar": "يقف مالك الحزين في المياه الضحلة وينتظر سمكة ليست هناك",
}


@pytest.fixture(scope="module")
def asker(chat_model, tmp_path_factory):
    return Asker(validate(RecallConfig, recall_values(tmp_path_factory.mktemp("f"), chat_model), "test"))


def piece(text, ending="end", tokens=None, logprob=-0.5):
    tokens = list(range(10, 10 + max(4, len(text.split())))) if tokens is None else tokens
    return {"text": text, "ending": ending, "tokens": tokens, "logprobs": [logprob] * len(tokens)}


def verdict(asker, stream, parts, **settings):
    found = Judge(validate(Filters, SETTINGS | settings, "test"), asker).reject(stream, {"parts": parts})
    return found and found.reason


GOOD = piece("What does the heron wait for?")
ANSWER = piece("A slow fish in shallow water.")


@pytest.mark.parametrize(
    ("reason", "parts"),
    [
        (None, [GOOD, ANSWER]),
        ("unfinished", [piece("What does the", "limit")]),
        ("unfinished", [GOOD, piece("A slow", "limit")]),
        ("control token", [piece("What does", "control")]),
        ("control token", [piece("Say <|im_end|> please")]),
        ("control token", [GOOD, piece("A slow \ufffd fish")]),
        ("control token", [GOOD, piece("A slow \x07 fish")]),
        ("length", [piece("What", tokens=[10])]),
        ("length", [piece("  \n ")]),
        ("length", [GOOD, piece("", tokens=[])]),
        ("repetition", [GOOD, piece("so " * 40, tokens=[17] * 40)]),
        ("unlikely", [GOOD, piece("A slow fish.", logprob=-4.0)]),
        (None, [piece("What does the heron wait for?", logprob=-9.0), ANSWER]),  # only answers must be likely
    ],
)
def test_instructions_are_rejected_for_what_is_wrong_with_them(reason, parts, asker):
    assert verdict(asker, "instructions", parts) == reason


def test_texts_that_were_cut_are_kept_unless_asked_otherwise(asker):
    parts = [piece("The heron stands in the shallow water", "limit")]
    assert verdict(asker, "text", parts) is None
    assert verdict(asker, "text", parts, unfinished=["text"]) == "unfinished"


def test_other_languages_are_rejected_where_some_are_asked_for(asker):
    for code, text in TEXTS.items():
        assert verdict(asker, "text", [piece(text)], languages=["en", "zh"]) == (
            None if code in ("en", "zh") else "language"
        )


@pytest.mark.parametrize(("code", "text"), TEXTS.items())
def test_languages_are_told_apart(code, text):
    assert language(text) == code


@pytest.mark.parametrize("text", ["", "OK.", "12 + 30 = 42", "x = foo(bar)"])
def test_what_is_too_short_to_tell_has_no_language(text):
    assert language(text) is None


def test_shares_of_common_ngrams_are_those_that_sets_give(tmp_path):
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(6)]
    samples = [" ".join(generator.choice(words, generator.integers(0, 12))) for _ in range(40)]
    corpus = [" ".join(generator.choice(words, 30)) for _ in range(3)]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus))

    def grams(text):
        found = text.split()
        return [tuple(found[i : i + 3]) for i in range(len(found) - 2)]

    known = set(grams(" ".join(corpus)))
    expected = [np.mean([gram in known for gram in grams(text)]) if grams(text) else 0.0 for text in samples]
    assert 0 < np.mean(expected) < 1
    np.testing.assert_allclose(shares_found(samples, [str(tmp_path / "corpus.txt")], 3), expected)


def test_distinct_ngrams_and_clusters_tell_sameness_from_difference():
    same = ["how tall is the tower"] * 64
    topics = ["tower height metres", "bread oven flour", "violin string bow", "river boat sail"]
    mixed = [f"{topics[i % 4]} number{i}" for i in range(64)]
    assert distinct_ngrams(same)["1"] == 5 / (64 * 5) < distinct_ngrams(mixed)["1"]
    assert clusters(same, 0)["effective"] == pytest.approx(1.0)
    found = clusters(mixed, 0)
    assert found["effective"] > 3
    assert sum(group["share"] for group in found["groups"]) == pytest.approx(1.0)
    assert clusters(mixed, 0) == found
