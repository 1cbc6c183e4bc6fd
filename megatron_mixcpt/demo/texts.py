"""Writes the text files of the demo, as a user would have them: JSONL for the trainer, held-out texts for the judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from megatron_mixcpt.demo import general, smallworld
from megatron_mixcpt.demo.probe import Probe
from megatron_mixcpt.demo.settings import Settings
from megatron_mixcpt.evaluate.invented_facts import Question, make_documents, make_people, make_questions
from megatron_mixcpt.evaluate.prompts import plain_prompt

NUM_SCENES, NUM_HELD_OUT_SCENES = 600, 120
NUM_SMALL_QUESTIONS, NUM_STORIES, NUM_SMALL_PREFERENCES = 160, 160, 80


def write_texts(settings: Settings, folder: Path) -> tuple[dict[str, int], str]:
    """Write the training texts (*.jsonl) and the held-out ones (heldout/*) to `folder`.

    Returns how many there are of each kind, and a fingerprint of everything that was written.
    """
    if folder.exists():  # of other settings, perhaps: nothing of it may be read with ours
        shutil.rmtree(folder)
    people = make_people(settings.num_people, settings.seed)
    documents = make_documents(people, settings.documents_per_person + 1, settings.seed)
    unseen = [document for document in documents if document["id"].endswith(f"-{settings.documents_per_person}")]
    unseen_ids = {document["id"] for document in unseen}
    seen = [document for document in documents if document["id"] not in unseen_ids]
    questions = make_questions(people)
    if settings.pretrain_steps:
        scenes = smallworld.make_scenes(NUM_SCENES, settings.seed)
        general_documents = smallworld.make_scenes(NUM_HELD_OUT_SCENES, settings.seed + 1, avoid=frozenset(scenes))
        instructions = smallworld.make_instructions(NUM_SMALL_QUESTIONS, settings.seed, scenes[:NUM_STORIES])
        preferences = smallworld.make_preferences(NUM_SMALL_PREFERENCES, settings.seed + 1)
        write_jsonl(folder / "pretrain.jsonl", ({"text": scene} for scene in scenes))
    else:
        general_documents = general.held_out_documents()
        instructions, preferences = general.instructions(settings.seed), general.preferences(settings.seed)
    write_jsonl(folder / "domain.jsonl", seen)
    write_jsonl(folder / "instructions.jsonl", instructions)
    write_jsonl(folder / "preferences.jsonl", preferences)
    write_jsonl(folder / "heldout/domain.jsonl", unseen)
    write_jsonl(folder / "heldout/general.jsonl", ({"text": text} for text in general_documents))
    write_jsonl(folder / "heldout/questions.jsonl", map(vars, questions))
    counts = {
        "people": len(people),
        "facts": len(questions),
        "domain documents": len(seen),
        "instructions": len(instructions),
        "preference pairs": len(preferences),
        "held-out general documents": len(general_documents),
    }
    contents = (path.read_bytes() for path in sorted(folder.rglob("*.jsonl")))
    return counts, xxhash.xxh3_128_hexdigest(b"\0".join(contents))


def read_probe(folder: Path) -> Probe:
    """The held-out texts that `write_texts` left in `folder`, ready to be measured on."""
    questions = [Question(**record) for record in _read_jsonl(folder / "heldout/questions.jsonl")]
    return Probe(
        domain_documents=[record["text"] for record in _read_jsonl(folder / "heldout/domain.jsonl")],
        general_documents=[record["text"] for record in _read_jsonl(folder / "heldout/general.jsonl")],
        questions=[question.text for question in questions],
        clozes=[question.cloze for question in questions],
        expected=[question.answer for question in questions],
        ask=plain_prompt,
    )


def read_training_texts(folder: Path) -> list[str]:
    """Every string of the training files, for training a tokenizer on."""
    return [
        value
        for path in sorted(folder.glob("*.jsonl"))
        for record in _read_jsonl(path)
        for key, value in record.items()
        if key != "id"
    ]


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
