"""Shares come out exactly, and views repeat and leave out exactly what was asked for."""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.commands import mix as mix_cli
from megatron_mixcpt.data.dataset import check_files
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import open_indexed
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.shares import Request, apportion, resolve_shares
from megatron_mixcpt.data_prep.verify import verify
from megatron_mixcpt.data_prep.views import ShareRequest, remix
from megatron_mixcpt.errors import ConfigError, MixcptError
from tests.data_prep.helpers import load_mix, sequences_of, source_of


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.lists(st.floats(0.001, 1000), min_size=1, max_size=12))
def test_apportioned_integers_sum_exactly_and_are_off_by_less_than_one(total, weights):
    counts = apportion(total, np.array(weights))
    assert counts.sum() == total
    exact = total * np.array(weights) / np.sum(weights)
    assert (np.abs(counts - exact) < 1 + 1e-6 * total).all() and (counts >= 0).all()


def shares(*requests, total=None):
    return {share.name: share for share in resolve_shares(list(requests), total)}


def test_weights_alone_are_normalised_and_no_source_is_repeated():
    found = shares(Request("a", 1000, weight=7), Request("b", 100, weight=3))
    assert (found["a"].share, found["b"].share) == pytest.approx((0.7, 0.3))
    assert found["b"].tokens == 100 and found["a"].tokens == 233 and found["b"].epochs == 1


def test_fixed_amounts_and_weights_go_together():
    found = shares(Request("a", 1000, tokens=600), Request("b", 50, epochs=4), Request("c", 900, weight=0.2))
    assert [found[name].tokens for name in "abc"] == [600, 200, 200]
    found = shares(Request("a", 1000, tokens=600), Request("b", 500, weight=1), Request("c", 500, weight=3), total=1000)
    assert [found[name].tokens for name in "abc"] == [600, 100, 300]
    assert sum(share.share for share in found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "requests, total, message",
    [
        ([Request("a", 100, weight=1, max_epochs=2)], 201, r"a would be repeated 2.01 times, max_epochs is 2"),
        ([Request("a", 100, epochs=3, max_epochs=2.5)], None, "repeated 3.00 times"),
        ([Request("a", 100, tokens=500)], 400, "more than total_tokens 400"),
        ([Request("a", 100, tokens=500)], 600, "give one source a weight"),
        ([Request("a", 100, tokens=5), Request("b", 9, weight=1.0)], None, "sum to less than 1"),
        ([Request("a", 0, weight=1)], None, "no training tokens"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(requests, total, message):
    with pytest.raises(ConfigError, match=message):
        resolve_shares(requests, total)


def test_a_share_of_targets_differs_from_a_share_of_tokens(config_values):
    config_values["sources"] = config_values["sources"][:2]
    config_values["sources"][1].update(loss="answer", weight=0.5)
    config_values["sources"][0]["weight"] = 0.5
    config_values["share_of"] = "targets"
    preprocess(parse_config(config_values))
    docs, ask = load_mix(Path(config_values["out"]))["sources"]
    targets = [
        source["weight"] / source["train"]["tokens"] * source["train"]["target_tokens"] for source in (docs, ask)
    ]
    assert targets[0] == pytest.approx(targets[1]) and ask["weight"] > docs["weight"]
    assert docs["weight"] + ask["weight"] == pytest.approx(1)


@pytest.fixture
def result(config_values) -> Path:
    preprocess(parse_config(config_values))
    return Path(config_values["out"])


def stored(folder: Path, prefix: str) -> list[bytes]:
    """Tokens and flags of every sequence."""
    return [tokens.tobytes() + flags.tobytes() for tokens, flags in sequences_of(folder, prefix)]


def test_a_view_holds_every_sequence_as_often_as_asked(result, tmp_path):
    out = tmp_path / "views"
    remix(result, out, {"docs": ShareRequest(epochs=0.4), "ask": ShareRequest(epochs=2.5), "pairs": None})
    mix, old = load_mix(out), load_mix(result)
    assert [source["name"] for source in mix["sources"]] == ["docs", "ask"]
    for name, epochs in (("docs", 0.4), ("ask", 2.5)):
        view, whole = source_of(mix, name)["train"], source_of(old, name)["train"]
        new, original = stored(out, view["prefix"]), stored(result, whole["prefix"])
        times = Counter(new)
        assert set(times) <= set(original) and len(set(original)) == len(original)
        assert abs(len(new) - epochs * len(original)) <= 1
        assert set(times.values()) <= ({1} if epochs < 1 else {2, 3})
    assert sum(source["weight"] for source in mix["sources"]) == pytest.approx(1)
    assert verify(out, sample=5).problems == []
    check_files(read_mix(out))  # as the trainer asks before a run
    train = read_mix(out).sources[0].train
    tokens = (out / f"{train.prefix.name}.bin").resolve()
    tokens.write_bytes(tokens.read_bytes()[:-400])
    with pytest.raises(ConfigError, match="it is truncated"):
        check_files(read_mix(result))
    with pytest.raises(ConfigError, match="is a view of another mixture"):
        remix(out, tmp_path / "again", {})


def test_a_view_copies_no_tokens_and_megatron_reads_it(result, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    out = tmp_path / "views"
    remix(result, out, {"docs": ShareRequest(weight=0.2)})
    for path in out.glob("*.bin"):
        assert path.is_symlink()
    entry = source_of(load_mix(out), "docs")["train"]
    ours, theirs = open_indexed(out / entry["prefix"]), IndexedDataset(str(out / entry["prefix"]))
    assert len(ours) == len(theirs) > 0
    assert all(np.array_equal(a, theirs[i]) for i, a in enumerate(ours))


def test_one_pass_over_the_views_is_the_mixture(result, tmp_path):
    out = tmp_path / "views"
    remix(
        result,
        out,
        {"docs": ShareRequest(weight=0.6), "ask": ShareRequest(weight=0.3), "pairs": ShareRequest(weight=0.1)},
        total_tokens=20000,
    )
    mix = load_mix(out)
    for name, weight in (("docs", 0.6), ("ask", 0.3), ("pairs", 0.1)):
        source = source_of(mix, name)
        # Off by half a sequence at most.
        assert abs(source["train"]["tokens"] - weight * 20000) <= 0.5 * 128 + 1
        assert source["weight"] == pytest.approx(
            source["train"]["tokens"] / sum(each["train"]["tokens"] for each in mix["sources"])
        )


def test_views_are_the_same_twice_and_differ_by_seed(result, tmp_path):
    names = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        remix(result, tmp_path / folder, {}, seed=seed)
        names.append(source_of(load_mix(tmp_path / folder), "docs")["train"]["prefix"])
    assert names[0] == names[1] != names[2]


def test_the_command_explains_itself(result, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    mix_cli.add_arguments(parser)

    def run(*words):
        return mix_cli.run(parser.parse_args([str(result), "--out", str(tmp_path / "v"), *words]))

    with pytest.raises(ConfigError, match="no source 'doc'; it has: docs, ask, pairs"):
        run("--weight", "doc=1")
    with pytest.raises(ConfigError, match="write SOURCE=X"):
        run("--weight", "docs")
    with pytest.raises(ConfigError, match="named twice"):
        run("--weight", "docs=1", "--drop", "docs")
    with pytest.raises(ConfigError, match="max_epochs is 1"):
        run("--epochs", "docs=2", "--weight", "ask=0.1", "--weight", "pairs=0.1", "--max-epochs", "1")
    assert run("--weight", "docs=0.5") == 0
    assert "docs: asked {'weight': 0.5}" in capsys.readouterr().out
    with pytest.raises(MixcptError, match="is not empty"):
        run()


def test_a_view_counts_what_its_mixture_counts(config_values, tmp_path):
    """Weights that were shares of targets stay that for the sources that are not named."""
    config_values["share_of"] = "targets"
    preprocess(parse_config(config_values))
    before = {source.name: source.share for source in read_mix(Path(config_values["out"])).sources}
    view = read_mix(remix(Path(config_values["out"]), tmp_path / "view", {"pairs": None}))
    after = {source.name: source.share for source in view.sources}
    assert {share.of for share in [*before.values(), *after.values()]} == {"targets"}
    asked = {name: share.requested["weight"] for name, share in before.items() if name != "pairs"}
    for name, share in after.items():
        assert share.share == pytest.approx(asked[name] / sum(asked.values()))
