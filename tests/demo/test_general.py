"""General texts: what retention is measured on was not trained on, and the exercises are right."""

import re

import pytest

from megatron_mixcpt.demo import general, smallworld

NGRAM = 8


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def training_texts() -> list[str]:
    records = general.instructions(1234) + general.preferences(1234)
    return [value for record in records for value in record.values()]


def test_held_out_prose_shares_no_eight_words_in_a_row_with_training_text():
    held_out = set().union(*map(ngrams, general.held_out_documents()))
    trained = set().union(*map(ngrams, training_texts()))
    assert len(held_out) > 5000
    assert held_out.isdisjoint(trained)


def test_held_out_documents_do_not_repeat_each_other():
    seen: set[tuple[str, ...]] = set()
    for document in general.held_out_documents():
        assert seen.isdisjoint(ngrams(document)), document[:60]
        seen |= ngrams(document)


def test_there_is_enough_of_everything():
    assert len(general.instructions(1234)) >= 300
    assert len(general.preferences(1234)) >= 100
    assert sum(len(text.split()) for text in general.held_out_documents()) >= 6500


def test_no_question_is_asked_twice_and_none_is_both_instruction_and_preference():
    asked = [r["instruction"] for r in general.instructions(7)] + [r["prompt"] for r in general.preferences(7)]
    assert len(asked) == len(set(asked))


def test_every_field_is_a_clean_line_and_chosen_differs_from_rejected():
    for text in training_texts():
        assert text == text.strip() and text and "\n" not in text
    assert all(record["chosen"] != record["rejected"] for record in general.preferences(3))


@pytest.mark.parametrize("seed", range(5))
def test_arithmetic_exercises_are_right_where_chosen_and_wrong_where_rejected(seed):
    checked = 0
    for record in general.preferences(seed):
        match = re.fullmatch(r"What is (\d+) plus (\d+)\?", record["prompt"])
        if match:
            total = int(match[1]) + int(match[2])
            assert record["chosen"].endswith(f" {total}.") and not record["rejected"].endswith(f" {total}.")
            checked += 1
        match = re.fullmatch(r"A box holds (\d+) apples. How many apples are in (\d+) boxes\?", record["prompt"])
        if match:
            assert f" {int(match[1]) * int(match[2])} apples." in record["chosen"]
            checked += 1
    assert checked >= 10


def test_small_world_scenes_for_measuring_are_not_among_those_for_training():
    trained = smallworld.make_scenes(600, 1)
    measured = smallworld.make_scenes(120, 2, avoid=frozenset(trained))
    assert len(set(trained)) == 600 and len(set(measured)) == 120
    assert set(trained).isdisjoint(measured)
    assert not any("{" in scene for scene in trained + measured)


def test_small_world_instructions_hold_questions_and_stories_of_the_given_scenes():
    scenes = smallworld.make_scenes(30, 1)
    records = smallworld.make_instructions(20, 2, scenes)
    assert len(records) == 50 and [record["response"] for record in records[20:]] == scenes
    for record in records[20:]:
        assert record["response"].startswith(record["instruction"].split(": ", 1)[1])


def test_small_world_preferences_prefer_what_the_question_says():
    for record in smallworld.make_preferences(80, 5):
        assert record["chosen"] != record["rejected"]
        went = re.match(r"(\w+) went to the (\w+)\. Where", record["prompt"])
        if went:
            assert went[2] in record["chosen"] and went[2] not in record["rejected"]
