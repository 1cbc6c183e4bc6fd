"""General Capabilities Integration: questions that need a domain fact and a general skill in the same answer.

The notion is ALoRA's (arXiv 2405.17830); instances and scoring are ours. Three scores: the answer states the right
facts (domain-correct), it uses the skill rightly on whatever facts it states (general-correct), and both. So a model
that learned facts and lost a skill, and one that kept the skill and learned nothing, are told apart.

A file has one instance a line:

    {"id": "...", "skill": "...", "prompt": "...", "domain": CHECK, "general": CHECK}

with one key in each CHECK, over whole words and whatever their case:

    {"all": ["heron", ...]}           all of them occur
    {"any": ["do not know", ...]}     one of them occurs
    {"none": ["heron", ...]}          none of them occurs
    {"sorted": ["heron", ...], "count": 3}   those of them that occur, at least `count`, come in alphabetical order
    {"answer_for": {"heron": "6", "otter": "12", "*": "12"}, "options": ["yes", "no"]}
                                      the answer is right for the fact that is stated: the first key that occurs, or "*"
                                      if none does. Given is the first of the `options` that occurs or, without options,
                                      the last number.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.answers import contains_answer, find_words
from megatron_mixcpt.evaluate.ledger import Item
from megatron_mixcpt.files import write_whole

Check = dict[str, Any]
SCORES = ("domain", "general", "both")
KINDS = ("all", "any", "none", "sorted", "answer_for")
# Commas before three digits each group thousands, another stands for a decimal point; "10-2500" is a range.
GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)")
NUMBER = re.compile(rf"(?:(?<!\w)-)?(?:{GROUPED.pattern}(?:\.\d+)?|\d+(?:[.,]\d+)?)")
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Instance:
    id: str
    skill: str
    prompt: str
    domain: Check
    general: Check


@dataclass(frozen=True)
class Answer:
    """An instance, what the model said, and what of it was right."""

    id: str
    skill: str
    prompt: str
    answer: str
    domain: bool
    general: bool
    sure: float | None = None
    """Mean log-probability of the answer's tokens."""
    chance: float = 0.0
    """Of guessing the general part right, where there are options."""

    @property
    def both(self) -> bool:
        return self.domain and self.general


@dataclass(frozen=True)
class GciScore:
    """A share of the instances with its 95 % Wilson interval. `score`: domain, general or both."""

    skill: str
    score: str
    count: int
    value: float
    low: float
    high: float


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % score interval of a share (E. B. Wilson, JASA 22, 1927): honest near 0 and 1 and for few instances."""
    share, z2 = right / count, Z_95**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def passes(check: Check, answer: str) -> bool:
    """Whether an answer meets a CHECK."""
    if "all" in check:
        return all(contains_answer(answer, word) for word in check["all"])
    if "any" in check:
        return any(contains_answer(answer, word) for word in check["any"])
    if "none" in check:
        return not any(contains_answer(answer, word) for word in check["none"])
    if "sorted" in check:
        stated = _stated(answer, check["sorted"])
        return len(stated) >= check["count"] and stated == sorted(stated, key=str.lower)
    answers = check["answer_for"]
    fact = next(iter(_stated(answer, [key for key in answers if key != "*"])), "*")
    if fact not in answers:
        return False
    if "options" in check:
        return next(iter(_stated(answer, check["options"])), None) == answers[fact]
    numbers = NUMBER.findall(answer)
    return bool(numbers) and math.isclose(_number(numbers[-1]), _number(answers[fact]))


def _stated(answer: str, words: Sequence[str]) -> list[str]:
    """Those of the words that occur, in the order in which they first do."""
    found = {word: find_words(answer, word) for word in words}
    return [word for word, _ in sorted(((w, m.start()) for w, m in found.items() if m), key=lambda pair: pair[1])]


def _number(text: str) -> float:
    return float(text.replace(",", "") if GROUPED.match(text.lstrip("-")) else text.replace(",", "."))


def score(instances: Sequence[Instance], answers: Sequence[str], sures: Sequence[float] | None = None) -> list[Answer]:
    """Judge the answers, in the order of the instances; `sures`: how sure the model was of each."""
    return [
        Answer(
            i.id,
            i.skill,
            i.prompt,
            answer,
            passes(i.domain, answer),
            passes(i.general, answer),
            sure,
            1 / len(set(i.general["options"])) if i.general.get("options") else 0.0,
        )
        for i, answer, sure in zip(instances, answers, sures or itertools.repeat(None, len(answers)), strict=True)
    ]


def summarize(answers: Sequence[Answer]) -> list[GciScore]:
    """The three scores of all instances, then of each skill."""
    skills = ["all", *dict.fromkeys(answer.skill for answer in answers)]
    scores = []
    for skill in skills:
        chosen = [answer for answer in answers if skill in ("all", answer.skill)]
        for name in SCORES:
            right = sum(getattr(answer, name) for answer in chosen)
            scores.append(GciScore(skill, name, len(chosen), right / len(chosen), *wilson(right, len(chosen))))
    return scores


def items(answers: Sequence[Answer]) -> list[Item]:
    """One for each answer and score, for the ledger."""
    return [
        Item(
            f"GCI, {name}", answer.skill, answer.id, answer.prompt, "", answer.answer, getattr(answer, name),
            answer.sure, answer.chance if name == "general" else 0.0,
        )
        for name in SCORES
        for answer in answers
    ]  # fmt: skip


def run_gci(
    hf_dir: Path,
    instances: Sequence[Instance],
    *,
    ask: Callable[[str], str],
    special_tokens: bool,
    dtype: str = "fp32",
    max_new_tokens: int = 48,
    batch_size: int = 16,
    on_progress: Callable[[float], None] | None = None,
) -> list[Answer]:
    """Greedy answers of the model in a Hugging Face directory, judged; on a GPU where there is one.

    Args:
        ask: makes an instance's prompt the model's.
        special_tokens: see `say`.
        dtype: fp32 or bf16, of weights and arithmetic.
    """
    from megatron_mixcpt.evaluate.generate import say
    from megatron_mixcpt.evaluate.loading import load_directory
    from megatron_mixcpt.huggingface.weights import DTYPES
    from megatron_mixcpt.runtime.devices import cuda_devices

    model, tokenizer = load_directory(hf_dir, dtype=DTYPES[dtype])
    model = model.to("cuda" if cuda_devices() else "cpu")
    prompts = [ask(instance.prompt) for instance in instances]
    said = say(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        min_new_tokens=3,
        special_tokens=special_tokens,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    return score(instances, [answer.text for answer in said], [answer.sure for answer in said])


def read_instances(path: Path) -> list[Instance]:
    """Instances of a file in the format above. Raises ConfigError naming the line and what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gci: {path}: cannot be read: {error}") from None
    instances: dict[str, Instance] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            instance = _read(line, f"--gci: {path}:{number}")
            if instance.id in instances:
                raise ConfigError(f"--gci: {path}:{number}: id {instance.id} stands in a line before: each has its own")
            instances[instance.id] = instance
    if not instances:
        raise ConfigError(f"--gci: {path}: no instance in it")
    return list(instances.values())


def write_instances(path: Path, instances: Sequence[Instance]) -> None:
    """The inverse of `read_instances`."""
    write_whole(path, "".join(json.dumps(vars(instance)) + "\n" for instance in instances))


def _read(line: str, where: str) -> Instance:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    keys = ("id", "skill", "prompt", "domain", "general")
    if not isinstance(content, dict) or set(content) != set(keys):
        raise ConfigError(f"{where}: an instance has exactly the keys {', '.join(keys)}")
    for key in ("domain", "general"):
        problem = _problem(content[key])
        if problem:
            raise ConfigError(f"{where}: {key}: {problem}")
    return Instance(str(content["id"]), str(content["skill"]), str(content["prompt"]), *(content[k] for k in keys[3:]))


def _problem(check: Any) -> str | None:
    kinds = [kind for kind in KINDS if isinstance(check, dict) and kind in check]
    if len(kinds) != 1:
        return f"a check has exactly one of the keys {', '.join(KINDS)}"
    value = check[kinds[0]]
    if kinds[0] == "answer_for":
        if not isinstance(value, dict) or not value or not all(isinstance(v, str) for v in value.values()):
            return "answer_for maps facts to answers, all of them text"
        options = check.get("options")
        if options is not None and len(set(options)) < 2:
            return "options are the answers to choose from, two or more"
        wrong = next((v for v in value.values() if v not in options), None) if options else None
        if wrong is not None:
            return f"answer {wrong!r} is none of the options"
        if not options and not all(NUMBER.fullmatch(v) for v in value.values()):
            return "without options, answers are numbers"
    elif not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        return f"{kinds[0]} is a list of words"
    elif kinds[0] == "sorted" and not isinstance(check.get("count"), int):
        return "sorted needs count, a whole number"
    return None
