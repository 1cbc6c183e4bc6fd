"""GCI: instances, checks, intervals, files; and a model that is asked."""

import json
import math

import pytest

from megatron_mixcpt.cli import main
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.gci import Instance, passes, read_instances, score, summarize, wilson, write_instances
from megatron_mixcpt.evaluate.gci_facts import LEGS, SKILLS, facts_instances, make_instances
from megatron_mixcpt.evaluate.invented_facts import make_people
from megatron_mixcpt.evaluate.measure import gci_instances

PEOPLE = make_people(5, seed=3)


def right_answer(instance):
    """An answer that is right in both, put together from the checks alone."""
    facts = instance.domain.get("all", [])
    general = instance.general
    if "sorted" in general:
        return ", ".join(sorted(facts))
    if "any" in general:
        return f"{general['any'][0]}, that is all."
    return f"{facts[0]}: {general['answer_for'].get(facts[0], general['answer_for'].get('*'))}."


def test_every_skill_has_instances_whose_right_answer_is_right_and_silence_is_wrong():
    instances = make_instances(PEOPLE, per_skill=30, seed=1)
    assert [i.skill for i in instances[::30]] == list(SKILLS) and len({i.id for i in instances}) == 150
    answers = score(instances, [right_answer(i) for i in instances])
    assert all(answer.both for answer in answers)
    silent = score(instances, [""] * len(instances))
    assert not any(answer.general for answer in silent)
    assert [answer.domain for answer in silent] == [i.skill == "refusal" for i in instances]
    assert make_instances(PEOPLE, 30, 1) == instances != make_instances(PEOPLE, 30, 2)


@pytest.mark.parametrize("skill", ["arithmetic", "comparison"])
def test_a_skill_used_rightly_on_a_wrong_fact_is_general_correct_alone(skill):
    for instance in make_instances(PEOPLE, 20, 5):
        if instance.skill != skill:
            continue
        table, own = instance.general["answer_for"], instance.domain["all"][0]
        other = next(fact for fact in table if fact not in ("*", own))
        (wrong_fact,) = score([instance], [f"It is {other}, so {table[other]}."])
        assert wrong_fact.general and not wrong_fact.domain
        spoilt = {"yes": "no", "no": "yes"}.get(table[own]) or str(int(table[own]) + 1)
        (wrong_skill,) = score([instance], [f"It is {own}, so {spoilt}."])
        assert wrong_skill.domain and not wrong_skill.general


def test_the_numbers_asked_for_are_those_of_the_world():
    for instance in make_instances(PEOPLE, 20, 5):
        if instance.skill == "arithmetic":
            count = int(next(word for word in instance.prompt.split() if word.isdigit()))
            assert instance.general["answer_for"]["*"] == str(count * LEGS[instance.domain["all"][0]])
        if instance.skill == "units":
            grams, price = (int(word) for word in instance.prompt.split() if word.isdigit())
            assert math.isclose(float(instance.general["answer_for"]["*"]), grams / 1000 * price)
        if instance.skill == "refusal":
            assert not any(person.name in instance.prompt for person in PEOPLE)


@pytest.mark.parametrize(
    ("check", "answer", "expected"),
    [
        ({"all": ["otter", "heron"]}, "A Heron and an otter", True),
        ({"all": ["otter"]}, "otters", False),
        ({"none": ["otter"]}, "a heron", True),
        ({"sorted": ["a", "b", "c"], "count": 2}, "c then b", False),
        ({"sorted": ["a", "b", "c"], "count": 2}, "a, c", True),
        ({"sorted": ["a", "b", "c"], "count": 3}, "a, c", False),
        ({"answer_for": {"*": "7.5"}}, "3 at 2.5 make 7,5", True),
        ({"answer_for": {"*": "7"}}, "7 of 10", False),
        ({"answer_for": {"*": "2500"}}, "It costs 2,500.", True),
        ({"answer_for": {"*": "2.5"}}, "It costs 2,500.", False),
        ({"answer_for": {"*": "1,234,567.5"}}, "1234567.5", True),
        ({"answer_for": {"*": "-1234567"}}, "-1,234,567", True),
        ({"answer_for": {"*": "2500"}}, "10-2500", True),
        ({"answer_for": {"*": "-5"}}, "it fell to -5", True),
        ({"answer_for": {"*": "0.125"}}, "0,125", True),
        ({"answer_for": {"otter": "8"}}, "8", False),
        ({"answer_for": {"*": "no"}, "options": ["yes", "no"]}, "No, not yes", True),
        ({"answer_for": {"*": "no"}, "options": ["yes", "no"]}, "perhaps", False),
    ],
)
def test_checks(check, answer, expected):
    assert passes(check, answer) is expected


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Brown, Cai and DasGupta (2001) and R's prop.test(correct = FALSE)
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_tabulated_ones(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_the_wilson_interval_covers_nineteen_times_in_twenty():
    for p in (0.1, 0.5, 0.9):
        covered = 0.0
        for right in range(41):
            low, high = wilson(right, 40)
            covered += math.comb(40, right) * p**right * (1 - p) ** (40 - right) * (low <= p <= high)
        assert 0.92 < covered < 0.98


def test_scores_are_shares_of_each_skill_and_of_all():
    instances = [Instance(str(n), "x" if n < 3 else "y", "?", {"all": ["a"]}, {"any": ["b"]}) for n in range(4)]
    scores = {(s.skill, s.score): s for s in summarize(score(instances, ["a b", "a", "b", ""]))}
    assert (scores["all", "domain"].value, scores["all", "both"].value, scores["all", "both"].count) == (0.5, 0.25, 4)
    assert scores["x", "general"].value == pytest.approx(2 / 3) and scores["y", "general"].value == 0.0


def test_files_round_trip_and_mistakes_are_named_with_their_line(tmp_path):
    path = tmp_path / "gci.jsonl"
    instances = make_instances(PEOPLE, 2, 0)
    write_instances(path, instances)
    assert read_instances(path) == instances == gci_instances(str(path))
    good = json.loads(path.read_text().splitlines()[0])
    for change, message in [
        ({"domain": {"some": ["x"]}}, "exactly one of the keys"),
        ({"general": {"answer_for": {"*": "seven"}}}, "answers are numbers"),
        ({"general": {"answer_for": {"*": "maybe"}, "options": ["yes", "no"]}}, "none of the options"),
        ({"general": {"answer_for": {"*": "yes"}, "options": ["yes", "yes"]}}, "two or more"),
        ({"general": {"sorted": ["x"]}}, "count"),
        ({"extra": 1}, "exactly the keys"),
    ]:
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        with pytest.raises(ConfigError, match=rf"gci.jsonl:2.*{message}"):
            read_instances(path)
    path.write_text((json.dumps(good) + "\n") * 2)
    with pytest.raises(ConfigError, match=rf"gci.jsonl:2: id {good['id']} stands in a line before"):
        read_instances(path)
    for text in ("facts:2", "facts:x", "nowhere.jsonl"):
        with pytest.raises(ConfigError, match="--gci"):
            gci_instances(text)
    assert len(facts_instances("facts")) == 100


def test_eval_reports_the_three_scores_beside_the_base_model(hf_dir, tmp_path, capsys):
    path = tmp_path / "gci.jsonl"
    instances = make_instances(PEOPLE, 1, 0)
    # What this random model says is its own; that anything at all is said is always right.
    write_instances(path, [*instances, Instance("any", "speech", "Speak.", {"none": ["zebra"]}, {"none": ["zebra"]})])
    command = ["eval", str(hf_dir), "--base", str(hf_dir), "--gci", str(path), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    report = (tmp_path / "out" / "eval.md").read_text()
    assert "| speech | both | 1 | 100% [21%, 100%] | 100% [21%, 100%] |" in report
    content = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert len(content["model"]["gci_answers"]) == 6 and content["model"]["gci"][0]["skill"] == "all"
    assert main(["eval", str(hf_dir), "--out", str(tmp_path / "out")]) == 2
    assert "--gci" in capsys.readouterr().err
