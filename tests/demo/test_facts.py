"""The fictional-facts domain is consistent, held-out where it says so, and cannot be guessed."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.evaluate.answers import contains_answer
from megatron_mixcpt.evaluate.invented_facts import (
    DOCUMENT_FORMS,
    NUM_DOCUMENT_FORMS,
    QUESTION_FORMS,
    make_documents,
    make_people,
    make_questions,
)

SEEDS = st.integers(min_value=0, max_value=2**31)
COUNTS = st.integers(min_value=1, max_value=14)


@settings(max_examples=40, deadline=None)
@given(count=COUNTS, seed=SEEDS)
def test_no_two_people_share_a_name_or_a_fact(count, seed):
    people = make_people(count, seed)
    assert len({person.name for person in people}) == count
    for attribute in QUESTION_FORMS:
        assert len({person.facts[attribute] for person in people}) == count


@settings(max_examples=40, deadline=None)
@given(count=COUNTS, seed=SEEDS)
def test_every_document_states_every_fact_of_its_person_and_of_nobody_else(count, seed):
    people = make_people(count, seed)
    for document in make_documents(people, NUM_DOCUMENT_FORMS, seed):
        index = int(re.match(r"person(\d+)-", document["id"]).group(1))
        for other, person in enumerate(people):
            assert (person.name in document["text"]) == (other == index)
        assert all(contains_answer(document["text"], answer) for answer in people[index].facts.values())


@settings(max_examples=40, deadline=None)
@given(count=COUNTS, seed=SEEDS)
def test_questions_and_their_answers_never_occur_in_each_other_or_in_training_text(count, seed):
    people = make_people(count, seed)
    corpus = " ".join(document["text"] for document in make_documents(people, NUM_DOCUMENT_FORMS, seed))
    questions = make_questions(people)
    assert len(questions) == count * len(QUESTION_FORMS)
    for question in questions:
        assert question.text not in corpus
        assert re.fullmatch(r"\w+", question.answer)
        assert not any(contains_answer(question.text, other.answer) for other in questions)


@settings(max_examples=40, deadline=None)
@given(count=COUNTS, seed=SEEDS, per_person=st.integers(min_value=1, max_value=NUM_DOCUMENT_FORMS))
def test_a_cloze_is_the_beginning_of_a_trained_sentence_that_goes_on_with_the_answer(count, seed, per_person):
    people = make_people(count, seed)
    corpus = " ".join(document["text"] for document in make_documents(people, per_person, seed))
    for question in make_questions(people):
        assert re.search(rf"{re.escape(question.cloze)} (an? )?{question.answer}\b", corpus)


def test_all_wordings_of_an_attribute_differ_and_name_the_person_before_the_answer():
    for forms in DOCUMENT_FORMS.values():
        assert len(set(forms)) == NUM_DOCUMENT_FORMS
        for form in forms:
            assert form.index("{n}") < form.index("{a}")


def test_the_same_seed_gives_the_same_domain_and_another_seed_another():
    assert make_documents(make_people(8, 1), 5, 1) == make_documents(make_people(8, 1), 5, 1)
    assert make_people(8, 1) != make_people(8, 2)


def test_articles_fit_the_word_that_follows():
    text = " ".join(document["text"] for document in make_documents(make_people(14, 3), NUM_DOCUMENT_FORMS, 3))
    assert not re.search(r"\ba [aeiou]", text)
    assert not re.search(r"\ban [^aeiou]", text)


@pytest.mark.parametrize("count", [0, 15])
def test_more_people_than_there_are_names_are_refused(count):
    with pytest.raises(ValueError, match="between 1 and 14"):
        make_people(count, 0)


@pytest.mark.parametrize("per_person", [0, NUM_DOCUMENT_FORMS + 1])
def test_more_documents_than_there_are_wordings_are_refused(per_person):
    with pytest.raises(ValueError, match="between 1 and 6"):
        make_documents(make_people(1, 0), per_person, 0)
