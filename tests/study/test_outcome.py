"""The rule that chooses a learning rate and an average, means over seeds, and the front."""

import math
import random
import statistics

import pytest

from megatron_mixcpt.study.config import ChooseConfig
from megatron_mixcpt.study.outcome import chosen, front, is_within, mean

SWEEP = {
    1e-5: {"domain": 0.1, "forgetting": 0.00, "tasks": 0.0, "facts": 0.1},
    1e-4: {"domain": 0.4, "forgetting": 0.04, "tasks": -0.02, "facts": 0.5},
    1e-3: {"domain": 0.9, "forgetting": 0.70, "tasks": -0.20, "facts": 0.4},
}


def whole(sweep):
    """Of runs, without averages."""
    return {(lr, 1.0): one for lr, one in sweep.items()}


@pytest.mark.parametrize(
    "gain, within, lr, is_within",
    [
        ("domain", {}, 1e-3, True),
        ("facts", {}, 1e-4, True),
        ("domain", {"forgetting": 0.05}, 1e-4, True),
        ("domain", {"forgetting": 0.04}, 1e-4, True),
        ("domain", {"forgetting": 0.05, "tasks": 0.01}, 1e-5, True),
        ("domain", {"tasks": 0.02}, 1e-4, True),
    ],
)
def test_the_rule_takes_the_highest_gain_of_those_within(gain, within, lr, is_within):
    assert chosen(ChooseConfig(gain=gain, within=within), whole(SWEEP)) == (lr, 1.0, is_within)


def test_an_average_is_taken_where_it_is_the_best_of_those_within_unless_the_rule_looks_at_whole_runs():
    half = {(lr, 0.5): {"domain": 0.8 * one["domain"], "forgetting": 0.05 * lr / 1e-3} for lr, one in SWEEP.items()}
    found, within = whole(SWEEP) | half, {"forgetting": 0.05}
    assert chosen(ChooseConfig(within=within), found) == (1e-3, 0.5, True)
    assert chosen(ChooseConfig(within=within, averages=False), found) == (1e-4, 1.0, True)
    assert chosen(ChooseConfig(averages=False), half) is None


def test_at_most_means_at_most_whatever_the_rounding():
    rule = ChooseConfig(within={"tasks": 0.05, "forgetting": 0.1})
    assert is_within(rule, {"tasks": 7 / 20 - 8 / 20, "forgetting": 0.3 - 0.2})
    assert not is_within(rule, {"tasks": -0.051, "forgetting": 0.0})


def test_where_none_is_within_the_least_forgetting_is_taken_and_said():
    worse = {lr: one | {"forgetting": one["forgetting"] + 1} for lr, one in SWEEP.items()}
    assert chosen(ChooseConfig(within={"forgetting": 0.05}), whole(worse)) == (1e-5, 1.0, False)
    assert chosen(ChooseConfig(), {}) is None


def test_of_equal_gains_the_smaller_learning_rate_is_taken_and_the_whole_run():
    equal = {(lr, alpha): {"domain": 1.0} for lr in (1e-3, 1e-4) for alpha in (0.5, 1.0)}
    assert chosen(ChooseConfig(), equal) == (1e-4, 1.0, True)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 14])
def test_an_interval_holds_95_percent_of_students_t(count):
    """By its density, summed; beyond the table of quantiles by what takes their place."""
    generator = random.Random(count)
    values = [generator.gauss(0, 1) for _ in range(count)]
    found, free = mean(values), count - 1
    quantile = found.half / statistics.stdev(values) * math.sqrt(count)
    scale = math.gamma((free + 1) / 2) / (math.sqrt(free * math.pi) * math.gamma(free / 2))
    step = quantile / 20_000
    inside = 2 * step * sum(scale * (1 + ((i + 0.5) * step) ** 2 / free) ** (-(free + 1) / 2) for i in range(20_000))
    assert math.isclose(found.value, statistics.fmean(values)) and abs(inside - 0.95) < 1e-3


def test_of_a_single_seed_there_is_no_interval():
    assert mean([0.5]).half is None and mean([0.5]).told("{:+.2f}") == "+0.50"
    assert mean([0.4, 0.6]).told("{:+.2f}") == "+0.50 ± 1.27"


def test_no_point_of_the_front_is_beaten_and_every_other_is():
    generator = random.Random(0)
    points = [(generator.choice([0.0, 0.1, 0.2, 0.3]), generator.randrange(6) / 5) for _ in range(40)]
    kept = front(points)

    def beaten(point):
        return any(x <= point[0] and y >= point[1] and (x, y) != point for x, y in points)

    assert kept == sorted({point for point in points if not beaten(point)})
