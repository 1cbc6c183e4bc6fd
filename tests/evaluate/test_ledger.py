"""Answers lost and learned: nothing is counted twice, guessing is no knowledge, and the intervals hold what is true."""

import random

import pytest

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.ledger import Item, flips, ledger


def item(number, right, *, task="t", group="t", sure=None, chance=0.0):
    return Item(task, group, str(number), f"question {number}", "yes", "", right, sure, chance)


def models(seed, count, *, lost, learned, known, chance):
    """(base, model, true shares) where each guesses what it does not know."""
    generator = random.Random(seed)
    base, model, truth = [], [], [0, 0]
    for number in range(count):
        draw = generator.random()
        before = draw < known + lost
        after = draw < known or known + lost <= draw < known + lost + learned
        truth[0] += before and not after
        truth[1] += after and not before
        for items, knows in ((base, before), (model, after)):
            items.append(item(number, knows or generator.random() < chance, chance=chance))
    return base, model, [share / count for share in truth]


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5])
def test_guessing_is_taken_out(chance):
    base, model, (lost, learned) = models(0, 20000, lost=0.1, learned=0.05, known=0.4, chance=chance)
    (entry,) = ledger(base, model)
    assert entry.lost.value == pytest.approx(lost, abs=0.02)
    assert entry.learned.value == pytest.approx(learned, abs=0.02)
    assert entry.change.value == pytest.approx(entry.learned.value - entry.lost.value)
    if chance == 0.0:
        assert entry.lost.value == lost and entry.num_lost == round(lost * 20000)


def test_guesses_that_agree_make_no_loss_of_nothing_and_nothing_negative():
    generator = random.Random(0)
    base = [item(number, generator.random() < 0.3, chance=0.25) for number in range(500)]
    model = [item(number, i.right if number >= 5 else not i.right, chance=0.25) for number, i in enumerate(base)]
    (same,), (near,) = ledger(base, base), ledger(base, model)
    assert same.lost.value == same.learned.value == same.lost.low == 0.0
    assert 0.0 <= near.lost.low <= near.lost.value <= 5 / 500 / 0.75
    right = [sum(i.right for i in items) / 500 for items in (base, model)]
    assert near.change.value == pytest.approx((right[1] - right[0]) / 0.75)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(60):
        base, model, _ = models(seed, 150, lost=0.15, learned=0.1, known=0.4, chance=0.25)
        (entry,) = ledger(base, model)
        held += entry.lost.low <= 0.15 <= entry.lost.high
        assert entry.lost.low <= entry.lost.value <= entry.lost.high
    assert 50 <= held <= 60


def test_the_same_answers_lose_and_learn_nothing():
    base = [item(number, number % 2 == 0, chance=0.0) for number in range(10)]
    (entry,) = ledger(base, base)
    assert (entry.num_lost, entry.num_learned, entry.lost.value, entry.change.high) == (0, 0, 0.0, 0.0)
    assert flips(base, base) == []


def test_flips_are_sorted_by_how_sure_the_base_model_was():
    base = [item(n, n < 3, sure=sure) for n, sure in enumerate([0.1, 3.0, 1.0, 0.5, 2.0, None])]
    model = [item(n, n >= 3, sure=0.0) for n in range(6)]
    found = flips(base, model)
    assert [flip.base.id for flip in found] == ["1", "2", "0", "4", "3", "5"]
    assert [flip.lost for flip in found] == [True, True, True, False, False, False]


def test_groups_are_told_apart_and_a_task_of_one_group_is_told_once():
    base = [item(n, True, task="skills", group="even" if n % 2 == 0 else "odd") for n in range(6)]
    model = [item(n, n % 2 == 0, task="skills", group=i.group) for n, i in enumerate(base)]
    entries = ledger([*base, item(0, True, task="one")], [*model, item(0, True, task="one")])
    assert [(e.task, e.group, e.count, e.num_lost) for e in entries] == [
        ("skills", None, 6, 3), ("skills", "even", 3, 0), ("skills", "odd", 3, 3), ("one", None, 1, 0),
    ]  # fmt: skip


def test_models_that_were_asked_other_questions_are_not_compared():
    with pytest.raises(ConfigError, match="not asked the same questions"):
        ledger([item(1, True)], [item(2, True)])
