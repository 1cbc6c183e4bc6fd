"""The budget's decisions on a simulated model, and the noise of paired measurements."""

import json
import math
import random

import pytest

from megatron_mixcpt.train.budget import LOWEST_RATE, WEIGHT_RANGE, BudgetController
from megatron_mixcpt.train.paired import rise

EVERY, STEPS = 10, 400


class Plant:
    """A model that forgets at a rate `drive` a step, less under more distillation, which also pulls it back."""

    def __init__(self, drive, *, ratio=0.3, pull=0.05, noise=0.0, batches=0.1, seed=0):
        self.drive, self.ratio, self.pull, self.noise, self.batches = drive, ratio, pull, noise, batches
        self.random = random.Random(seed)
        self.forgotten = self.learned = 0.0

    def step(self, weight, rate):
        share = 1 / (1 + weight)
        self.forgotten += rate * (self.drive * share - self.pull * (1 - share) * self.forgotten)
        self.learned += rate * share

    def divergence(self):
        return max(self.forgotten, 0.0) / self.ratio * (1 + self.batches * self.random.gauss(0, 1))

    def measure(self):
        return self.forgotten + self.noise * self.random.gauss(0, 1)


class LearnsFirst(Plant):
    """The divergence also grows by what is learned, and general text is learned before any of it is forgotten."""

    def __init__(self, drive, *, first, **options):
        super().__init__(drive, **options)
        self.first = first  # nats a token of general text

    def first_learned(self):
        return self.first * (1 - math.exp(-self.drive * self.learned / self.first))

    def divergence(self):
        return super().divergence() + self.first_learned() / self.ratio

    def measure(self):
        return super().measure() - 2 * self.first_learned()


def run(plant, budget, *, steps=STEPS, control=True, every=EVERY, early=True):
    """(controller, everything that was forgotten, all pressures)."""
    controller = BudgetController(budget, every)
    forgotten, factors = [], []
    for step in range(1, steps + 1):
        plant.step(controller.weight_factor if control else 1.0, controller.rate_factor if control else 1.0)
        controller.observed(plant.divergence())
        if step % every == 0 or (early and controller.in_doubt):
            controller.measured(step, plant.measure(), plant.noise, plant.learned)
        forgotten.append(plant.forgotten)
        factors.append((controller.weight_factor, controller.rate_factor))
        if controller.exhausted:
            break
    return controller, forgotten, factors


@pytest.mark.parametrize("holds", [True, False])
def test_the_weight_of_a_teacher_that_does_not_hold_is_never_raised(holds):
    controller = BudgetController(0.1, EVERY, holds=holds)
    for step in range(1, 2 * EVERY):
        controller.observed(0.006 * step)
        if step % EVERY == 0:
            controller.measured(step, 0.002 * step, 0.005, 0.5)
    assert (controller.weight_factor > 1, controller.rate_factor < 1) == (holds, not holds)


def test_a_divergence_that_grows_before_anything_was_forgotten_is_warning_enough():
    weights = []
    for divergence in (0.1, 2.0):
        controller = BudgetController(0.1, EVERY)
        for step in range(1, 2 * EVERY):
            controller.observed(0.1 if step <= EVERY else divergence)
            if step == EVERY:
                controller.measured(step, 0.0, 0.005, 0.5)
        weights.append(controller.weight_factor)
    assert weights[0] < 1 < weights[1]


@pytest.mark.parametrize("drive", [0.0003, 0.001, 0.003])
@pytest.mark.parametrize("budget", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_budget_is_kept_and_used(drive, budget, seed):
    noise = 0.05 * budget
    controller, forgotten, _ = run(Plant(drive, noise=noise, seed=seed), budget)
    late = forgotten[STEPS // 2 :]
    assert max(forgotten) <= budget + 2 * noise
    _, free, _ = run(Plant(drive, noise=noise, seed=seed), budget, control=False)
    if max(free) > 2 * budget:
        assert sum(late) / len(late) > 0.4 * budget  # it is not kept by learning nothing
    assert controller.best is not None


@pytest.mark.parametrize("budget", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_would_take_budgets_between_two_measurements_takes_hardly_more_than_one(budget, seed):
    drive = 1.0 * budget  # a step; ten steps from measurement to measurement
    _, forgotten, _ = run(Plant(drive, noise=0.05 * budget, seed=seed), budget)
    _, free, _ = run(Plant(drive, noise=0.05 * budget, seed=seed), budget, control=False)
    assert max(forgotten) < 1.5 * budget and free[EVERY - 1] > 3 * budget


@pytest.mark.parametrize("first", [0.5, 2.0])
def test_a_divergence_that_misleads_is_measured_against_before_it_has_cost_much(first):
    """Four measurements in all, as in a short run: without more of them a quarter of it passes at 1/64."""
    budget, learned = 0.02, {False: 0.0, True: 0.0}
    for early in learned:
        for seed in range(4):
            plant = LearnsFirst(0.003, first=first * budget, noise=0.05 * budget, seed=seed)
            controller, forgotten, _ = run(plant, budget, steps=48, every=12, early=early)
            assert max(forgotten) - 2 * plant.first_learned() <= 1.1 * budget
            learned[early] += controller.best.gain
    assert learned[True] > 1.15 * learned[False]


@pytest.mark.parametrize("holds", [True, False])
def test_a_measurement_is_asked_for_only_where_a_warning_alone_lowers_the_learning_rate(holds):
    def after(steps, divergence, forgotten):
        controller = BudgetController(0.02, 20, holds=holds)
        controller.observed(0.0)
        controller.measured(1, forgotten, 0.001, 1.0)
        for _ in range(steps):
            controller.observed(divergence)
        return controller.in_doubt

    assert after(5, 1.0, 0.0) and after(5, 1.0, -0.05)
    assert not after(4, 1.0, 0.0)  # so soon after the last
    assert not after(19, 0.0, 0.0)  # no warning
    assert not after(5, 1.0, 0.017)  # beyond the aim: what was measured lowers it by itself
    assert not after(19, 0.0, 0.014)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["forgotten", "noise", "gain"])
def test_a_measurement_that_is_no_number_changes_nothing(which, bad):
    controller, undisturbed = BudgetController(0.02, EVERY), BudgetController(0.02, EVERY)
    for step in (10, 20, 30):
        good = {"forgotten": 0.001 * step, "noise": 0.001, "gain": 0.1 * step}
        if step == 20:
            assert "no finite number" in controller.measured(step, **(good | {which: bad}))
        else:
            for each in (controller, undisturbed):
                each.measured(step, **good)
    assert controller.state() == undisturbed.state() and math.isfinite(controller.rate_factor)


def test_where_averages_follow_training_may_forget_more_and_its_best_step_may_not():
    plant, controller = Plant(0.003, noise=0.0005), BudgetController(0.02, EVERY, allowance=6.0)
    forgotten = {}
    for step in range(1, STEPS + 1):
        plant.step(controller.weight_factor, controller.rate_factor)
        controller.observed(plant.divergence())
        if step % EVERY == 0:
            forgotten[step] = plant.measure()
            controller.measured(step, forgotten[step], plant.noise, plant.learned)
    assert 0.05 < max(forgotten.values()) < 0.125
    assert controller.best is not None
    assert controller.best[0] == max(step for step, value in forgotten.items() if value <= 0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_more_budget_learns_more(seed):
    learned = []
    for budget in (0.005, 0.02, 0.08):
        plant = Plant(0.003, noise=0.0005, seed=seed)
        run(plant, budget)
        learned.append(plant.learned)
    assert learned == sorted(learned) and learned[-1] > 1.2 * learned[0]


def test_where_nothing_is_forgotten_the_weight_falls_to_its_bound():
    _, _, factors = run(Plant(0.0), 0.02)
    weights = [weight for weight, _ in factors]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == pytest.approx(WEIGHT_RANGE[0]) and factors[-1][1] == 1.0


def test_the_learning_rate_falls_only_when_the_weight_is_at_its_bound_and_training_ends_when_both_are():
    plant = Plant(0.01, pull=0.0)
    plant.step = lambda weight, rate: setattr(plant, "forgotten", plant.forgotten + 0.01)  # whatever is done
    controller, _, factors = run(plant, 0.02)
    assert all(rate == 1.0 or weight == pytest.approx(WEIGHT_RANGE[1]) for weight, rate in factors)
    assert factors[-1][1] == pytest.approx(LOWEST_RATE)
    assert controller.exhausted and len(factors) < STEPS
    assert "the end" in controller.measured(STEPS, 9.0, 0.0, 0.0)


def test_the_divergence_raises_the_weight_before_the_next_measurement():
    controllers = [BudgetController(0.02, 100) for _ in range(2)]
    for controller in controllers:
        for _ in range(1, 101):
            controller.observed(0.05)
        controller.measured(100, 0.004, 0.001, 1.0)
    for _ in range(101, 150):
        controllers[0].observed(0.05)
        controllers[1].observed(0.08)
    weak, strong = (controller.weight_factor / controller.rate_factor for controller in controllers)
    assert strong > 4 * weak > 0


@pytest.mark.parametrize("holds", [True, False])
def test_a_divergence_that_runs_away_is_answered_before_anything_was_measured(holds):
    controller = BudgetController(0.02, 100, holds=holds)
    for step in range(1, 51):
        controller.observed(0.006 * step)
    assert controller.weight_factor / controller.rate_factor > 8


def test_nothing_moves_within_the_noise():
    controller = BudgetController(0.02, 10)
    for step in range(1, 11):
        controller.observed(0.0 if step == 1 else 0.04)
    controller.measured(10, 0.014, 0.004, 1.0)
    controller.measured(20, 0.014, 0.004, 1.0)  # as at the last: expected 0.014, aimed at 0.016
    controller.observed(0.04)
    before = controller.weight_factor
    for _ in range(22, 30):
        controller.observed(0.04)
    assert controller.weight_factor == pytest.approx(before, rel=0.03)


@pytest.mark.parametrize("holds", [True, False])
def test_beyond_the_budget_nothing_is_let_go(holds):
    controller = BudgetController(0.02, EVERY, holds=holds)
    pressures = []
    for step in range(1, 8 * EVERY):
        controller.observed(0.02 * min(step, 3 * EVERY))
        if step % EVERY == 0:  # what it was at once, and then no more
            controller.measured(step, 0.03, 0.001, 1.0)
        pressures.append(controller.weight_factor / controller.rate_factor)
    assert pressures[EVERY:] == sorted(pressures[EVERY:]) and pressures[-1] > 16


def test_a_swing_dies_out():
    """What dual ascent alone does not: it adds up what forgetting adds up already."""
    _, forgotten, _ = run(Plant(0.003), 0.02, steps=600)
    swings = [max(forgotten[i : i + 100]) - min(forgotten[i : i + 100]) for i in (100, 500)]
    assert swings[1] < 0.25 * 0.02 and max(forgotten) < 1.25 * 0.02


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batches_that_differ_by_chance_move_nothing(seed):
    """The divergence of small batches: 0.6 on average, and what half of the budget is forgotten for is 0.05 of it."""
    controller, generator = BudgetController(0.05, EVERY), random.Random(seed)
    pressures = []
    for step in range(1, 20 * EVERY):
        controller.observed(0.6 + 0.2 * generator.gauss(0, 1))
        if step % EVERY == 0:
            controller.measured(step, 0.04, 0.005, 1.0)
        pressures.append(math.log(controller.weight_factor / controller.rate_factor))
    moves = [abs(now - before) for before, now in zip(pressures[EVERY:], pressures[EVERY + 1 :])]
    assert sum(moves) / len(moves) < 0.4  # of log 4096 from end to end


def test_what_the_penalty_could_not_add_at_one_bound_it_does_not_take_at_the_other():
    controller = BudgetController(0.02, EVERY)
    for divergence in (0.0, 0.0, *[0.5] * EVERY):
        controller.observed(divergence)
    assert controller.rate_factor == pytest.approx(LOWEST_RATE)
    controller.measured(EVERY + 2, 0.0, 0.001, 1.0)  # nothing was forgotten at all
    controller.observed(0.5)
    assert controller.weight_factor > 0.5


def test_another_mixture_has_another_divergence():
    controller = BudgetController(0.1, EVERY)
    for _ in range(1, EVERY + 1):
        controller.observed(0.02)
    controller.measured(EVERY, 0.05, 0.001, 1.0)
    controller.mixture_changed()
    controller.observed(3.0)
    assert controller.expected < 0.1  # it is not that the model moved


def test_a_state_that_went_through_json_goes_on_bitwise():
    whole, cut = Plant(0.003, noise=0.001), Plant(0.003, noise=0.001)
    expected, _, factors = run(whole, 0.02, steps=100)
    first, _, early = run(cut, 0.02, steps=37)
    controller = BudgetController(0.02, EVERY, json.loads(json.dumps(first.state(), allow_nan=False)))
    for step in range(38, 101):
        cut.step(controller.weight_factor, controller.rate_factor)
        controller.observed(cut.divergence())
        if step % EVERY == 0:
            controller.measured(step, cut.measure(), cut.noise, cut.learned)
        early.append((controller.weight_factor, controller.rate_factor))
    assert early == factors and controller.state() == expected.state()


def test_the_best_step_is_the_one_that_learned_most_within_the_budget():
    controller = BudgetController(0.02, 10)
    assert controller.best is None
    for step, forgotten, gain in ((10, 0.01, 1.0), (20, 0.019, 2.0), (30, 0.021, 9.0), (40, 0.005, 1.5)):
        controller.measured(step, forgotten, 0.0, gain)
    assert controller.best == (20, 2.0, 0.019)
    best = controller.best
    controller.measured(50, 0.01, 0.0, 3.0)
    controller.unsaved(50, best)
    assert controller.best == best


def test_divergences_that_are_not_finite_are_no_divergences():
    controller = BudgetController(0.02, 10)
    controller.observed(0.1)
    controller.measured(1, 0.016, 0.0, 1.0)
    for value in (math.nan, math.inf):
        controller.observed(value)
    assert math.isfinite(controller.weight_factor) and math.isfinite(controller.expected)


def test_paired_noise_leaves_out_how_hard_the_items_are():
    generator = random.Random(0)
    tokens = [generator.randint(5, 50) for _ in range(400)]
    before = [n * generator.uniform(0, 10) for n in tokens]
    rises = [n * (0.1 + 0.2 * generator.gauss(0, 1)) for n in tokens]
    now = [a + b for a, b in zip(before, rises)]
    measured = rise(before, now, tokens)
    assert abs(measured.mean - 0.1) < 4 * measured.noise
    assert measured.noise == pytest.approx(0.2 / math.sqrt(400), rel=0.25)
    same = rise(before, [a + 0.1 * n for a, n in zip(before, tokens)], tokens)
    assert same.mean == pytest.approx(0.1) and same.noise < 1e-9


def test_the_noise_is_that_of_drawing_the_items_again():
    generator = random.Random(1)
    means, noises = [], []
    for _ in range(300):
        tokens = [generator.randint(1, 30) for _ in range(40)]
        rises = [n * generator.gauss(0.05, 0.3) for n in tokens]
        measured = rise([0.0] * 40, rises, tokens)
        means.append(measured.mean)
        noises.append(measured.noise)
    average = sum(means) / len(means)
    spread = math.sqrt(sum((mean - average) ** 2 for mean in means) / len(means))
    assert sum(noises) / len(noises) == pytest.approx(spread, rel=0.15)


def test_one_item_says_nothing_about_its_noise():
    assert rise([1.0, 0.0], [2.0, 0.0], [4, 0]).noise == math.inf
    assert rise([], [], []).mean == 0.0
