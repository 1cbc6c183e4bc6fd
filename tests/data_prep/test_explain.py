"""The mixture in words, where it is made and where it is planned."""

from pathlib import Path

import pytest

from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.explain import explain_mixture, explain_passes
from megatron_mixcpt.data_prep.mix import Mix, Source, SourceShare, Split
from megatron_mixcpt.data_prep.pipeline import preprocess


def mixture(requested: list[dict[str, float]], weights: list[float], sequences: list[int]) -> Mix:
    sources = [
        Source(
            name, "domain", weight, Split(Path(name), count, 16 * count, name), None,
            share=SourceShare("tokens", asked, weight, round(weight * 160), weight * 160 / (16 * count)),
        )
        for name, asked, weight, count in zip("abc", requested, weights, sequences)
    ]  # fmt: skip
    return Mix(Path("mix.json"), 16, "", None, tuple(sources))  # type: ignore[arg-type]


def test_weights_that_do_not_sum_to_one_are_said_and_others_are_not():
    odd = mixture([{"weight": 2.0}, {"weight": 3.0}], [0.4, 0.6], [10, 10])
    assert explain_mixture(odd)[-1] == "the weights sum to 5, not to 1: each is taken as its share of that"
    for requested in ([{"weight": 0.4}, {"weight": 0.6}], [{"weight": 0.4}, {"tokens": 96}]):
        assert len(explain_mixture(mixture(requested, [0.4, 0.6], [10, 10]))) == 2


def test_how_often_each_source_is_seen_follows_from_the_draws():
    mix = mixture([{"weight": 0.5}, {"weight": 0.5}], [0.5, 0.5], [100, 10])
    # 20 steps of 4 samples: 40 of each source.
    first, second, warning = explain_passes(mix, 20, 4)
    assert "0.40 x 1600 tokens; one pass takes 50 steps" in first
    assert "4.00 x 160 tokens; one pass takes 5 steps" in second
    assert warning.startswith("warning: b 4.0 times")
    assert len(explain_passes(mix, 5, 4)) == 2


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (7, 2, 1)])
def test_preprocess_says_what_was_asked_and_reached(config_values, capfd, weights):
    for source, weight in zip(config_values["sources"], weights):
        source["weight"] = weight
    preprocess(parse_config(config_values))
    said = capfd.readouterr().err
    assert f"mixture: docs (domain): asked for weight {weights[0]:g}, gets 70.0% of the tokens; has " in said
    assert ("the weights sum to 10, not to 1" in said) == (sum(weights) > 2)
    assert "epochs" not in (Path(config_values["out"]) / "report.md").read_text()
