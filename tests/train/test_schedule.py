"""Learning-rate schedules: shape, continuity and end points."""

import itertools

import pytest

from megatron_mixcpt.config import TrainConfig
from megatron_mixcpt.train.schedule import learning_rate


def rates(**values):
    config = TrainConfig(**({"steps": 100, "lr": 1e-3, "min_lr": 1e-5, "warmup_steps": 10} | values))
    return [learning_rate(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_never_zero(schedule):
    warm = rates(schedule=schedule)[:10]
    assert warm == pytest.approx([1e-3 * (step + 1) / 11 for step in range(10)])
    assert rates(schedule=schedule)[10] == pytest.approx(1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_decay_is_monotone_and_ends_just_above_the_minimum(schedule):
    decay = rates(schedule=schedule)[10:]
    assert all(a >= b for a, b in itertools.pairwise(decay))
    assert 1e-5 < decay[-1] < 1e-4


def test_cosine_is_half_way_at_half_time():
    assert rates(schedule="cosine")[55] == pytest.approx((1e-3 + 1e-5) / 2)


def test_wsd_is_constant_until_its_last_fifth():
    rate = rates(schedule="wsd")
    assert rate[10:81] == [1e-3] * 71
    assert rate[90] == pytest.approx((1e-3 + 1e-5) / 2)


def test_constant_stays():
    assert set(rates(schedule="constant")[10:]) == {1e-3}
