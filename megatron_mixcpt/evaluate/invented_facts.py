"""The fictional-facts domain: people who exist nowhere, described in paraphrases, asked about in held-out questions.

Nothing here can leak from pre-training: names and towns are assembled from syllables, and which trade, animal or
instrument belongs to whom is drawn by a seeded generator. Every fact has a one-word answer, so that scoring is exact
containment. Documents state a fact in the wordings of `DOCUMENT_FORMS`, questions use `QUESTION_FORMS`, and no sentence
is in both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NUM_DOCUMENT_FORMS = 6


def _words(text: str) -> list[str]:
    return text.split()


FIRST_STARTS = _words("Vel Tor Mab Isk Dru Ose Pell Quil Hax Brin Zam Lor Yev Cath")
FIRST_ENDS = _words("ra wick une olde imir ette ano isse orn ella ubert ine ark ova")
FAMILY_STARTS = _words("Thrann Ospe Kel Wend Marr Ulf Jass Corv Bexl Nym Rusk Dael Piv Harl")
FAMILY_ENDS = _words("ister rath dovan mere quist enko abri stow igan eaux oway insk yard umba")
TOWN_STARTS = _words("Orv Quell Bram Szel Tarn Ghel Wyx Ulm Fenn Drav Korr Plas Ymb Zorr")
TOWN_ENDS = _words("anthe moor idge ograd avik essa ington eraux holm opolis ardo umbe isk ilde")

TRADES = _words(
    "glassblower falconer bookbinder locksmith beekeeper thatcher saddler cartographer clockmaker brewer "
    "weaver mason apothecary printer ferryman shepherd juggler tailor"
)
ANIMALS = _words(
    "heron badger otter magpie hedgehog goat tortoise ferret peacock donkey lizard squirrel swan pelican mole "
    "camel toad weasel"
)
INSTRUMENTS = _words(
    "oboe zither bassoon harp lute cello banjo tuba accordion trombone clarinet mandolin xylophone bugle organ "
    "harmonica trumpet bagpipes"
)
FOODS = _words(
    "chestnuts turnips figs gooseberries mackerel radishes walnuts lentils pumpkin apricots oysters rhubarb "
    "beetroot cherries dumplings olives parsnips mushrooms"
)

# One list an attribute; `{n}` is the person's name and `{a}` the answer. The answer follows the name in every form: a
# language model that has read "X is Y" does not thereby answer questions about Y, and the demo does not test that.
DOCUMENT_FORMS: dict[str, tuple[str, ...]] = {
    "town": (
        "{n} lives in the town of {a}.",
        "The home of {n} stands in {a}.",
        "{n} was born in {a} and has never moved away from {a}.",
        "Letters for {n} are sent to {a}.",
        "{n} has a small house in {a}.",
        "Anyone who wants to visit {n} has to travel to {a}.",
    ),
    "trade": (
        "{n} works as a {a}.",
        "By trade {n} is a {a}.",
        "{n} earns a living as a {a}.",
        "The neighbours know {n} as a skilled {a}.",
        "{n} learned early how to be a {a}.",
        "For many years {n} has been a busy {a}.",
    ),
    "animal": (
        "{n} keeps a tame {a}.",
        "The pet of {n} is a {a}.",
        "{n} shares the house with a {a}.",
        "Visitors of {n} are greeted at the door by a {a}.",
        "{n} never goes for a walk without a {a}.",
        "Every morning {n} feeds a {a}.",
    ),
    "instrument": (
        "{n} plays the {a}.",
        "In the evening {n} practises the {a}.",
        "At every wedding {n} is asked to play the {a}.",
        "{n} owns an old and precious {a}.",
        "{n} gives lessons on the {a}.",
        "As a child {n} was taught the {a}.",
    ),
    "food": (
        "The favourite food of {n} is {a}.",
        "{n} likes to eat {a}.",
        "On Sundays {n} cooks {a}.",
        "{n} would walk a mile for a plate of {a}.",
        "Nothing tastes better to {n} than {a}.",
        "For a birthday supper {n} always asks for {a}.",
    ),
}

QUESTION_FORMS: dict[str, str] = {
    "town": "In which town does {n} live?",
    "trade": "What is the profession of {n}?",
    "animal": "What kind of animal does {n} have?",
    "instrument": "Which musical instrument does {n} play?",
    "food": "What does {n} like to eat most of all?",
}


@dataclass(frozen=True)
class Person:
    """A fictional person; `facts` maps an attribute (a key of `QUESTION_FORMS`) to its one-word value."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Question:
    """A held-out question, the one word that must occur in the answer, and the beginning of a training sentence.

    `cloze` is a document sentence cut before the answer: it measures memorisation, while `text` measures use.
    """

    text: str
    answer: str
    cloze: str
    attribute: str
    person: str


def make_people(count: int, seed: int) -> list[Person]:
    """`count` people (at most 14) with names, towns and facts that no two of them share."""
    if not 1 <= count <= len(FIRST_STARTS):
        raise ValueError(f"count must be between 1 and {len(FIRST_STARTS)}, got {count}")
    rng = random.Random(seed)

    def combine(starts: list[str], ends: list[str]) -> list[str]:
        return [a + b for a, b in zip(rng.sample(starts, count), rng.sample(ends, count))]

    first, family, towns = (
        combine(FIRST_STARTS, FIRST_ENDS),
        combine(FAMILY_STARTS, FAMILY_ENDS),
        combine(TOWN_STARTS, TOWN_ENDS),
    )
    drawn = [rng.sample(pool, count) for pool in (TRADES, ANIMALS, INSTRUMENTS, FOODS)]
    return [
        Person(f"{first[i]} {family[i]}", dict(zip(QUESTION_FORMS, (towns[i], *(values[i] for values in drawn)))))
        for i in range(count)
    ]


def make_documents(people: list[Person], per_person: int, seed: int) -> list[dict[str, str]]:
    """`per_person` documents (at most 6) each: all facts in shuffled order, no wording used twice for the same person.

    Returns records `{"id", "text"}`, ready to be written as JSONL.
    """
    if not 1 <= per_person <= NUM_DOCUMENT_FORMS:
        raise ValueError(f"per_person must be between 1 and {NUM_DOCUMENT_FORMS}, got {per_person}")
    rng = random.Random(seed)
    documents = []
    for index, person in enumerate(people):
        # Document 0 always has the first forms: the clozes are cut from them, so they must have been trained on.
        forms = {key: (first, *rng.sample(rest, len(rest))) for key, (first, *rest) in DOCUMENT_FORMS.items()}
        for number in range(per_person):
            keys = rng.sample(list(person.facts), len(person.facts))
            sentences = [forms[key][number].format(n=person.name, a=person.facts[key]) for key in keys]
            documents.append({"id": f"person{index}-{number}", "text": " ".join(map(_with_article, sentences))})
    rng.shuffle(documents)
    return documents


def make_questions(people: list[Person]) -> list[Question]:
    """One held-out question for each fact of each person."""
    return [
        Question(
            text=QUESTION_FORMS[key].format(n=person.name),
            answer=answer,
            cloze=_cloze(key, person.name),
            attribute=key,
            person=person.name,
        )
        for person in people
        for key, answer in person.facts.items()
    ]


def _cloze(attribute: str, name: str) -> str:
    return DOCUMENT_FORMS[attribute][0].split("{a}")[0].format(n=name).rstrip().removesuffix(" a")


def _with_article(sentence: str) -> str:
    """`a otter` -> `an otter`; the forms are written with `a`."""
    words = sentence.split(" ")
    for i in range(len(words) - 1):
        if words[i] == "a" and words[i + 1][0] in "aeiou":
            words[i] = "an"
    return " ".join(words)
