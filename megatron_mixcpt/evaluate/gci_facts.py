"""GCI instances over the fictional-facts domain: each needs a fact about an invented person and one general skill."""

from __future__ import annotations

import random

from megatron_mixcpt.evaluate import invented_facts as facts
from megatron_mixcpt.evaluate.gci import Instance
from megatron_mixcpt.evaluate.invented_facts import Person, make_people

LEGS = dict.fromkeys(facts.ANIMALS, 4) | dict.fromkeys(["heron", "magpie", "peacock", "swan", "pelican"], 2)
REFUSALS = [
    "sorry",
    "do not know",
    "don't know",
    "does not say",
    "not sure",
    "unknown",
    "no information",
    "cannot answer",
    "can't answer",
    "cannot say",
    "can't say",
    "not aware",
    "never heard",
]
SKILLS = ("arithmetic", "comparison", "listing", "units", "refusal")


def make_instances(people: list[Person], per_skill: int, seed: int) -> list[Instance]:
    """`per_skill` instances of each of SKILLS, in their order; raises ValueError for fewer than three people."""
    if len(people) < 3:
        raise ValueError("listing needs at least three people")
    rng = random.Random(seed)
    makers = {
        "arithmetic": _arithmetic,
        "comparison": _comparison,
        "listing": _listing,
        "units": _units,
        "refusal": _refusal,
    }
    return [
        Instance(f"{skill}-{number}", skill, *makers[skill](rng, people))
        for skill in SKILLS
        for number in range(per_skill)
    ]


def _arithmetic(rng: random.Random, people: list[Person]) -> tuple[str, dict, dict]:
    person, count = rng.choice(people), rng.randint(2, 9)
    animal = person.facts["animal"]
    prompt = f"Name the animal of {person.name}, then say as a number how many legs {count} such animals have together."
    legs = {name: str(count * number) for name, number in LEGS.items()}
    return prompt, {"all": [animal]}, {"answer_for": legs | {"*": legs[animal]}}


def _comparison(rng: random.Random, people: list[Person]) -> tuple[str, dict, dict]:
    person, other = rng.choice(people), rng.choice(["Lisbon", "Madrid", "Nairobi", "Quito", "Tokyo"])
    towns = [one.facts["town"] for one in people]
    prompt = f"In which town does {person.name} live, and does its name come before {other} in the alphabet, yes or no?"
    right = {town: "yes" if town.lower() < other.lower() else "no" for town in towns}
    own = person.facts["town"]
    return prompt, {"all": [own]}, {"answer_for": right | {"*": right[own]}, "options": ["yes", "no"]}


def _listing(rng: random.Random, people: list[Person]) -> tuple[str, dict, dict]:
    attribute, pool = rng.choice(
        [("trade", facts.TRADES), ("instrument", facts.INSTRUMENTS), ("animal", facts.ANIMALS)]
    )
    chosen = rng.sample(people, 3)
    what = {"trade": "trades", "instrument": "musical instruments", "animal": "animals"}[attribute]
    names = f"{chosen[0].name}, {chosen[1].name} and {chosen[2].name}"
    prompt = f"List the {what} of {names} in alphabetical order."
    return prompt, {"all": [one.facts[attribute] for one in chosen]}, {"sorted": list(pool), "count": 3}


def _units(rng: random.Random, people: list[Person]) -> tuple[str, dict, dict]:
    person, price, half_kilograms = rng.choice(people), 2 * rng.randint(1, 6), rng.randint(3, 11)
    prompt = (
        f"{person.name} buys {500 * half_kilograms} grams of a favourite food at {price} coins a kilogram. "
        "Name the food, then say as a number how many coins that costs."
    )
    return prompt, {"all": [person.facts["food"]]}, {"answer_for": {"*": str(price // 2 * half_kilograms)}}


def _refusal(rng: random.Random, people: list[Person]) -> tuple[str, dict, dict]:
    known = {word for person in people for word in person.name.split()}
    first, family = (
        rng.choice([name for name in (a + b for a in starts for b in ends) if name not in known])
        for starts, ends in ((facts.FIRST_STARTS, facts.FIRST_ENDS), (facts.FAMILY_STARTS, facts.FAMILY_ENDS))
    )
    attribute = rng.choice([key for key in facts.QUESTION_FORMS if key != "town"])
    pool = {
        "trade": facts.TRADES,
        "animal": facts.ANIMALS,
        "instrument": facts.INSTRUMENTS,
        "food": facts.FOODS,
    }[attribute]
    question = facts.QUESTION_FORMS[attribute].format(n=f"{first} {family}")
    return f"{question} If you have no information, say so.", {"none": list(pool)}, {"any": REFUSALS}


def facts_instances(text: str) -> list[Instance]:
    """Instances of `facts[:PEOPLE[:SEED]]`, the people of a demo run; its defaults are those of `make demo`.

    Raises ValueError where it is written differently.
    """
    name, *numbers = text.split(":")
    if name != "facts" or len(numbers) > 2:
        raise ValueError("written facts, facts:PEOPLE or facts:PEOPLE:SEED")
    values = [6, 1234]
    values[: len(numbers)] = [int(number) for number in numbers]
    count, seed = values
    return make_instances(make_people(count, seed), per_skill=20, seed=seed)
