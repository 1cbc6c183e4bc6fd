"""A small world for a small model: a grammar of village scenes that a model of a million weights can learn in a minute.

`--model tiny` pre-trains on these scenes, so that there is something to forget, and measures retention on other scenes
of the same grammar. Real prose would be out of reach for such a model, and nothing could be seen to be lost.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Greta",
    "Henry",
    "Ida",
    "Jack",
    "Laura",
    "Martin",
    "Nora",
    "Paul",
)
JOBS = {
    "baker": "bread", "farmer": "corn", "fisher": "fish", "gardener": "roses", "smith": "horseshoes",
    "miller": "flour", "potter": "jugs", "hatter": "hats", "cook": "soup", "florist": "tulips",
}  # fmt: skip
PLACES = ("mill", "market", "church", "school", "bridge", "harbour", "forest", "station", "inn", "lake")
THINGS = ("basket", "letter", "lamp", "ladder", "blanket", "kettle", "broom", "bucket", "rope", "book")
PETS = ("dog", "cat", "pony", "hen", "rabbit", "duck")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHER = {
    "It was raining": "took an umbrella",
    "The sun was shining": "wore a straw hat",
    "It was snowing": "put on warm boots",
    "A cold wind blew": "buttoned up the coat",
    "Fog lay on the fields": "carried a lantern",
}
FEELINGS = {"happy": "laughed", "sad": "wept", "tired": "yawned", "angry": "shouted", "afraid": "trembled"}
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")

SCENES = (
    "On {day} {name} the {job} went to the {place}. {weather}, so {name} {gear}. At the {place} {name} met {other} and "
    "sold some {goods}. In the evening they walked home together.",
    "{name} had a {pet}. The {pet} was lost, and {name} was {feeling} and {verb}. Then {other} found the {pet} behind "
    "the {place} and brought it back before {day}.",
    "{other} wanted to buy {number} {goods_of} from the {job}. The {job} was called {name}. {other} paid, put the "
    "{goods} into a {thing}, and was home before dark.",
    "There was a {thing} on the road to the {place}. {name} saw it on {day} and took it to the {job}. The {job} said: "
    "This {thing} belongs to {other}.",
    "{weather} when {name} came to the {place}. {other} was {feeling} and {verb}. {name} gave {other} a {thing}, and "
    "after that they were good friends.",
    "Every {day} the {job} makes {goods} for the village. {name} and {other} help with it. When the work is done, they "
    "sit near the {place} and feed the {pet}.",
)  # fmt: skip


STORY_WORDS = 5


def make_scenes(count: int, seed: int, avoid: frozenset[str] = frozenset()) -> list[str]:
    """`count` different scenes, none of which is in `avoid`."""
    rng = random.Random(seed)
    scenes: dict[str, None] = {}
    while len(scenes) < count:
        scene = _scene(rng)
        if scene not in avoid:
            scenes[scene] = None
    return list(scenes)


def _scene(rng: random.Random) -> str:
    name, other = rng.sample(NAMES, 2)
    job = rng.choice(list(JOBS))
    weather = rng.choice(list(WEATHER))
    feeling = rng.choice(list(FEELINGS))
    return rng.choice(SCENES).format(
        name=name,
        other=other,
        job=job,
        goods=JOBS[job],
        goods_of=f"bags of {JOBS[job]}",
        weather=weather,
        gear=WEATHER[weather],
        feeling=feeling,
        verb=FEELINGS[feeling],
        day=rng.choice(DAYS),
        place=rng.choice(PLACES),
        thing=rng.choice(THINGS),
        pet=rng.choice(PETS),
        number=rng.choice(NUMBERS),
    )


def make_instructions(count: int, seed: int, scenes: Sequence[str]) -> list[dict[str, str]]:
    """`{"instruction", "response"}`: `count` questions about a sentence, then a request to tell each of `scenes`."""
    questions = [{"instruction": question, "response": right} for question, right, _ in _questions(count, seed)]
    beginnings = (" ".join(scene.split()[:STORY_WORDS]) for scene in scenes)
    stories = [
        {"instruction": f"Tell a story that begins like this: {beginning}", "response": scene}
        for beginning, scene in zip(beginnings, scenes)
    ]
    return questions + stories


def make_preferences(count: int, seed: int) -> list[dict[str, str]]:
    """`count` questions with a right and a wrong answer: `{"prompt", "chosen", "rejected"}`."""
    return [
        {"prompt": question, "chosen": right, "rejected": wrong} for question, right, wrong in _questions(count, seed)
    ]


def _questions(count: int, seed: int) -> list[tuple[str, str, str]]:
    rng = random.Random(seed)
    questions: dict[str, tuple[str, str, str]] = {}
    while len(questions) < count:
        name = rng.choice(NAMES)
        (job, wrong_job), (place, wrong_place) = rng.sample(list(JOBS), 2), rng.sample(PLACES, 2)
        (thing, wrong_thing), (pet, wrong_pet) = rng.sample(THINGS, 2), rng.sample(PETS, 2)
        question = rng.choice(
            (
                (f"{name} went to the {place}. Where did {name} go?", f"To the {place}.", f"To the {wrong_place}."),
                (
                    f"{name} is a {job}. What does {name} make?",
                    f"{name} makes {JOBS[job]}.",
                    f"{name} makes {JOBS[wrong_job]}.",
                ),
                (f"{name} took a {thing}. What did {name} take?", f"A {thing}.", f"A {wrong_thing}."),
                (f"{name} has a {pet}. What kind of animal does {name} have?", f"A {pet}.", f"A {wrong_pet}."),
                (f"Who makes {JOBS[job]}?", f"The {job}.", f"The {wrong_job}."),
            )
        )
        questions.setdefault(question[0], question)
    return list(questions.values())
