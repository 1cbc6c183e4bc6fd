"""The general side of the mixture: hand-written records shipped with the package, and exercises from a small grammar.

All texts were written for this project (Apache-2.0, like the rest of it). What is trained on (instructions, preference
pairs) and what is only measured on (`held_out_documents`) share no sentence; tests/demo checks it.
"""

from __future__ import annotations

import json
import random
from importlib.resources import files

NUM_TEMPLATED_INSTRUCTIONS = 90
NUM_TEMPLATED_PREFERENCES = 60

WORDS = (
    "anchor", "bottle", "candle", "desert", "engine", "feather", "garden", "hammer", "island", "jacket", "kitchen",
    "lantern", "meadow", "needle", "orchard", "pencil", "quarry", "ribbon", "saddle", "tunnel", "umbrella", "village",
    "window", "yard",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
UNITS = (("metres", "centimetres", 100), ("kilograms", "grams", 1000), ("hours", "minutes", 60), ("weeks", "days", 7))


def instructions(seed: int) -> list[dict[str, str]]:
    """General instruction records `{"instruction", "response"}`: the hand-written ones, then exercises."""
    exercises = _exercises(NUM_TEMPLATED_INSTRUCTIONS, seed)
    return _read_jsonl("instructions.jsonl") + [{"instruction": q, "response": right} for q, right, _ in exercises]


def preferences(seed: int) -> list[dict[str, str]]:
    """General preference records `{"prompt", "chosen", "rejected"}`: the hand-written ones, then exercises."""
    # Another seed than the instructions', and their questions left out: a pair must not be answered elsewhere.
    known = {q for q, _, _ in _exercises(NUM_TEMPLATED_INSTRUCTIONS, seed)}
    exercises = _exercises(NUM_TEMPLATED_PREFERENCES, seed + 1, known)
    return _read_jsonl("preferences.jsonl") + [
        {"prompt": q, "chosen": right, "rejected": wrong} for q, right, wrong in exercises
    ]


def held_out_documents() -> list[str]:
    """General prose for measuring retention; never trained on."""
    text = files(__package__).joinpath("data/general_heldout.txt").read_text(encoding="utf-8")
    return [document.strip() for document in text.split("\n\n") if document.strip()]


def _read_jsonl(name: str) -> list[dict[str, str]]:
    text = files(__package__).joinpath(f"data/{name}").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _exercises(count: int, seed: int, avoid: set[str] | frozenset[str] = frozenset()) -> list[tuple[str, str, str]]:
    """`count` different (question, right answer, wrong answer), none of whose questions is in `avoid`."""
    rng = random.Random(seed)
    makers = (_sum, _difference, _product, _conversion, _alphabet, _month, _letters)
    exercises: dict[str, tuple[str, str, str]] = {}
    while len(exercises) < count:
        exercise = makers[len(exercises) % len(makers)](rng)
        if exercise[0] not in avoid:
            exercises.setdefault(exercise[0], exercise)
    return list(exercises.values())


def _sum(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(11, 89), rng.randint(11, 89)
    return (
        f"What is {a} plus {b}?",
        f"{a} plus {b} is {a + b}.",
        f"{a} plus {b} is {a + b + rng.choice((-10, -1, 1, 10))}.",
    )


def _difference(rng: random.Random) -> tuple[str, str, str]:
    b, rest = rng.randint(3, 40), rng.randint(3, 50)
    question = f"There are {b + rest} people on a bus and {b} get off. How many stay on the bus?"
    return question, f"{rest} people stay on the bus.", f"{rest + b} people stay on the bus."


def _product(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(3, 12), rng.randint(3, 12)
    question = f"A box holds {a} apples. How many apples are in {b} boxes?"
    return question, f"There are {a} times {b}, so {a * b} apples.", f"There are {a} plus {b}, so {a + b} apples."


def _conversion(rng: random.Random) -> tuple[str, str, str]:
    large, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 15)
    return f"How many {small} are {n} {large}?", f"{n * factor} {small}.", f"{n * factor * 10} {small}."


def _alphabet(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(WORDS, 3)
    right = sorted(words)
    wrong = [right[1], right[0], right[2]]
    return f"Sort alphabetically: {', '.join(words)}.", f"{', '.join(right)}.", f"{', '.join(wrong)}."


def _month(rng: random.Random) -> tuple[str, str, str]:
    i = rng.randrange(12)
    question, answer = rng.choice((("follows", i + 1), ("comes before", i - 1)))
    return f"Which month {question} {MONTHS[i]}?", f"{MONTHS[answer % 12]}.", f"{MONTHS[(i + 5) % 12]}."


def _letters(rng: random.Random) -> tuple[str, str, str]:
    word = rng.choice(WORDS)
    return f"How many letters does the word {word} have?", f"{len(word)} letters.", f"{len(word) + 2} letters."
