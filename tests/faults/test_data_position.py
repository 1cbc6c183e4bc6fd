"""Every sample once, whatever is stopped, resumed, resized or reweighted in between."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.data.permutation import permuted
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.data_prep.mix import Mix, Source, Split
from megatron_mixcpt.errors import ConfigError
from tests.faults.conftest import STEPS, run_settings
from tests.faults.fleet import finish, metrics, write_config
from tests.helpers.corpus import write_mix


def mixture(weights, contents=None):
    """A mixture of sources a, b, c ... of 50, 51, 52 ... sequences."""
    sources = [
        Source(
            name, "domain", weight, Split("", 50 + index, 128 * (50 + index), (contents or {}).get(name, name)), None
        )
        for index, (name, weight) in enumerate(zip("abcdefgh", weights))
        if weight > 0
    ]
    return Mix(None, 16, "", None, tuple(sources))


weights = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6)


@given(weights, st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_any_cuts_give_the_same_draws(shares, cuts):
    whole, cut = Position.start(mixture(shares), 1), Position.start(mixture(shares), 1)
    drawn = []
    for size in cuts:
        drawn += cut.draw(size)
        cut, changes = Position.resume(cut.state(), mixture(shares), 1)
        assert changes == []
    assert drawn == whole.draw(sum(cuts)) and cut.state() == whole.state()


@given(weights, st.integers(1, 500))
def test_each_source_is_counted_up_without_gaps_and_keeps_to_its_weight(shares, count):
    draws = Position.start(mixture(shares), 1).draw(count)
    assert [draw.order for draw in draws] == list(range(count))
    for source, share in enumerate(shares):
        assert [draw.number for draw in draws if draw.source == source] == list(
            range(sum(d.source == source for d in draws))
        )
        for length in (count, count // 2):
            realised = sum(draw.source == source for draw in draws[:length])
            assert abs(realised - length * share / sum(shares)) <= len(shares)


def test_a_mixture_changed_on_resume_is_exact(record):
    """10,000 samples at 60:30:10, then as many at 20:20:60 with a new source, then the first weights again."""
    first, second = mixture([0.6, 0.3, 0.1]), mixture([0.2, 0.2, 0.0, 0.6])
    position = Position.start(first, 1)
    seen, worst = {}, 0.0
    for mix in (first, second, first):
        position, changes = Position.resume(position.state(), mix, 1)
        assert bool(changes) == (mix is second or bool(seen and "d" in seen))
        draws = position.draw(10_000)
        for index, source in enumerate(mix.train_sources):
            numbers = [draw.number for draw in draws if draw.source == index]
            begin = seen.get(source.name, 0)
            assert numbers == list(range(begin, begin + len(numbers))), "lost or repeated"
            seen[source.name] = begin + len(numbers)
            worst = max(worst, abs(len(numbers) / 10_000 - source.weight))
    assert {name: source["drawn"] for name, source in position.state()["sources"].items()} == seen
    assert position.total == 30_000 and worst <= 0.005
    record(
        "mixture changed twice on resume", "counters exact, mix within 0.5 % over 10k samples", f"exact, {worst:.3%}"
    )


def test_changes_are_named_and_what_would_lose_the_place_is_refused():
    state = Position.start(mixture([0.5, 0.5]), 1).state()
    _, changes = Position.resume(state, mixture([0.75, 0.0, 0.25]), 1)
    assert changes == ["a: 50.0% -> 75.0%", "c: new, 25.0%", "b: 50.0% -> none"]
    with pytest.raises(ConfigError, match=r"train\.seed was 1 and is 2"):
        Position.resume(state, mixture([0.5, 0.5]), 2)
    with pytest.raises(ConfigError, match="source b has other training data"):
        Position.resume(state, mixture([0.5, 0.5], {"b": "changed"}), 1)


@settings(max_examples=50)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_an_epoch_is_a_permutation(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_orders_are_spread_evenly():
    """Where element 0 of 8 lands, over 4,000 keys: a chi-square of 7 degrees of freedom, and pairs of neighbours."""
    places = np.bincount([[permuted(i, 8, key) for i in range(8)].index(0) for key in range(4000)], minlength=8)
    assert ((places - 500) ** 2 / 500).sum() < 24.3  # 0.1 %
    order = [permuted(index, 1000, 5) for index in range(1000)]
    steps = np.diff(order)
    assert (steps == 1).sum() < 10 and abs(np.corrcoef(order, range(1000))[0, 1]) < 0.1


def test_the_sample_stream_is_the_same_over_restarts_and_ranks(tmp_path, mix, straight, record):
    """Stopped three times; one rank, then two, then two with another micro-batch, then one again."""
    run = tmp_path / "run"
    parts = [(3, 1, 1), (6, 2, 1), (9, 2, 2), (STEPS, 1, 2)]
    for steps, ranks, micro in parts:
        train = {"steps": steps, "micro_batch_size": micro, "schedule": "constant"}
        finish(write_config(tmp_path / "train.yaml", run_settings(mix, run, train=train)), ranks=ranks)
    expected, found = metrics(straight[0], "data/stream"), metrics(run, "data/stream")
    assert found == expected and len(set(found.values())) == STEPS
    record(
        "data order over 3 restarts, DP 1 -> 2 -> 1",
        "sample stream identical, nothing lost or repeated",
        f"{STEPS}/{STEPS} steps",
    )


def test_weights_changed_in_the_configuration_are_logged_and_take_effect(tmp_path, mix):
    run = tmp_path / "run"
    config = write_config(tmp_path / "train.yaml", run_settings(mix, run))
    finish(config, "train.steps=5")
    output = finish(config, "data.weights={facts: 0.25, tasks: 0.75}")
    assert "mixture changed at step 5: facts: 60.0% -> 25.0%, tasks: 40.0% -> 75.0%" in output
    other = write_mix(tmp_path / "other", seed=9, seq_length=16, vocab_size=120)
    assert "source facts has other training data" in finish(config, f"data.mix={other}", "train.steps=20", code=2)
    assert "name each of them" in finish(config, "data.weights={facts: 1}", "train.steps=20", code=2)


def test_other_content_gives_another_stream(tmp_path, straight):
    other = write_mix(tmp_path / "other", seed=9, seq_length=16, vocab_size=120)
    finish(write_config(tmp_path / "train.yaml", run_settings(other, tmp_path / "run", train={"steps": 3})))
    found, expected = metrics(tmp_path / "run", "data/stream"), metrics(straight[0], "data/stream")
    assert all(found[step] != expected[step] for step in itertools.islice(expected, 3))
