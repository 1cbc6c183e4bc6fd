"""Texts, mixtures and training files of the study: `python -m benchmarks.study.prepare DOMAIN [--general FILE]`.

    RUNS/smollm2/                     the model, out of a Python package
    RUNS/recalled/                    what the model itself remembers, as kept beside the project's results; drawn anew
                                      where that is removed
    RUNS/DOMAIN/{docs,mixture,recall,replay}/   prepared data: the domain alone, with instructions and preferences,
                                      with what the model remembers, with general text (where there is some)
    RUNS/DOMAIN/train.yaml            what every arm of benchmarks/study/DOMAIN.yaml lays its settings over
    RUNS/DOMAIN/questions.jsonl       of the invented facts

DOMAIN is `facts`, people who exist nowhere (the demo's), or `medquad`, articles of a JSONL file (its key `text`).
Finished runs of the project's own studies of DOMAIN (kept.py) go where those go on. Run again, it makes what is missing
or changed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.kept import RESULTS, STUDIES, put_back
from megatron_mixcpt.demo import general
from megatron_mixcpt.demo.base_model import save_smollm2
from megatron_mixcpt.demo.configs import recall_yaml
from megatron_mixcpt.demo.settings import SMOLLM2
from megatron_mixcpt.demo.texts import write_jsonl
from megatron_mixcpt.errors import ConfigError, MixcptError
from megatron_mixcpt.evaluate.gci import Instance, write_instances
from megatron_mixcpt.evaluate.invented_facts import make_documents, make_people, make_questions
from megatron_mixcpt.evaluate.prompts import ANSWER_PREFIX, QUESTION_PREFIX

RUNS = Path("runs/study")
RECALLED_BEFORE = RESULTS / "recalled"
SEED = 1234
PEOPLE, DOCUMENTS_PER_PERSON = 6, 5
ARTICLES, HELD_OUT_ARTICLES = 200, 8
GENERAL_DOCUMENTS, HELD_OUT_GENERAL = 400, 60
SHARES = {"domain": 0.65, "instructions": 0.25, "preferences": 0.1}
REPLAYED = 0.35  # of the tokens, in place of instructions and preferences
RECALLED = {"instructions": 0.25, "text": 0.1}  # likewise
EVERY = 10  # of the instructions, one is held out
TRAIN = {
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "lr": 1.5e-4,
    "warmup_steps": 4,
    "weight_decay": 0.0,
    "dtype": "fp32",
}
SEQ_LENGTH = 256


@dataclass(frozen=True)
class Size:
    """What decides how long a study of a domain takes."""

    steps: int
    held_out: int  # texts of prose and of general text that all are measured on, at most
    validated: int  # sequences a source at the end of a run, beside what the study measures


SIZES = {"facts": Size(48, HELD_OUT_GENERAL, 16), "medquad": Size(32, 20, 2)}


def facts(folder: Path) -> tuple[list[dict], list[dict]]:
    """Documents to train on and held-out ones about the same people; writes questions.jsonl."""
    people = make_people(PEOPLE, SEED)
    documents = make_documents(people, DOCUMENTS_PER_PERSON + 1, SEED)
    held_out = [document for document in documents if document["id"].endswith(f"-{DOCUMENTS_PER_PERSON}")]
    # The fact alone is asked for: whatever the answer says beside it is right.
    instances = [
        Instance(str(number), "recall", question.text, {"any": [question.answer]}, {"none": ["\0"]})
        for number, question in enumerate(make_questions(people))
    ]
    write_instances(folder / "questions.jsonl", instances)
    return [document for document in documents if document not in held_out], held_out


def medquad(path: Path) -> tuple[list[dict], list[dict]]:
    """Articles of a file, spread evenly over it, and held-out ones between them. Raises ConfigError."""
    articles = read_texts(path)
    count = ARTICLES + HELD_OUT_ARTICLES
    if len(articles) < count:
        raise ConfigError(f"--medquad {path}: {len(articles)} articles, {count} are needed")
    chosen = articles[:: len(articles) // count][:count]
    every = count // HELD_OUT_ARTICLES
    held_out = chosen[::every][:HELD_OUT_ARTICLES]
    return [article for article in chosen if article not in held_out], held_out


def read_texts(path: Path) -> list[dict]:
    """Records of a JSONL file; of a plain one paragraphs of at least 200 characters. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [{"text": json.loads(line)["text"]} for line in text.splitlines()]
    except (OSError, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: no texts can be read from it: {error!r}") from None
    return [{"text": part.strip()} for part in text.splitlines() if len(part) >= 200]


def recall(base: Path, folder: Path) -> None:
    """What the model in `base` writes from nothing: instructions.jsonl and text.jsonl in `folder`."""
    names = [f"{name}.jsonl" for name in RECALLED]
    if all((folder / name).is_file() for name in names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if RECALLED_BEFORE.is_dir():
        for name in names:
            shutil.copyfile(RECALLED_BEFORE / name, folder / name)
        return
    path = folder.with_suffix(".yaml")
    path.write_text(recall_yaml(SMOLLM2, base, folder))
    run("recall", str(path))


def run(*command: str) -> None:
    """`mixcpt COMMAND`."""
    subprocess.run([sys.executable, "-m", "megatron_mixcpt.cli", *command], check=True)


def prepare(domain: str, general_file: Path | None, articles: Path | None, out: Path) -> None:
    """Write everything; see the top of this file. Raises ConfigError for a file that does not do."""
    base, folder, size = out / "smollm2", out / domain, SIZES[domain]
    folder.mkdir(parents=True, exist_ok=True)
    if not (base / "model.safetensors").is_file():
        save_smollm2(base)
    if domain == "medquad" and articles is None:
        raise ConfigError("medquad: give its articles with --medquad FILE.jsonl")
    recall(base, out / "recalled")
    documents, held_out = facts(folder) if domain == "facts" else medquad(articles)
    texts = folder / "texts"
    write_jsonl(texts / "domain.jsonl", documents)
    write_jsonl(texts / "domain-heldout.jsonl", held_out)
    instructions = general.instructions(SEED)
    write_jsonl(texts / "instructions.jsonl", [one for i, one in enumerate(instructions) if i % EVERY])
    write_jsonl(texts / "instructions-heldout.jsonl", instructions[::EVERY])
    write_jsonl(texts / "preferences.jsonl", general.preferences(SEED))
    prose = general.held_out_documents()
    write_jsonl(texts / "prose-heldout.jsonl", [{"text": text} for text in prose[: size.held_out]])
    replay: list[dict] = []
    if general_file is not None:
        found = read_texts(general_file)
        needed = GENERAL_DOCUMENTS + HELD_OUT_GENERAL
        if len(found) < needed:
            raise ConfigError(f"--general {general_file}: {len(found)} texts, {needed} are needed")
        chosen = found[:: len(found) // needed][:needed]
        write_jsonl(texts / "general.jsonl", chosen[HELD_OUT_GENERAL:])
        write_jsonl(texts / "general-heldout.jsonl", chosen[: size.held_out])
        replay = [source("general", "general", texts, REPLAYED)]
    # What all are measured on stands in the mixture that most are trained on.
    measured = [source("prose", "general", texts, None)] + [source("general", "general", texts, None)] * bool(replay)
    mixtures = {
        "docs": [source("domain", "domain", texts, 1.0)],
        "mixture": [
            source("domain", "domain", texts, SHARES["domain"]),
            source("instructions", "instruction", texts, SHARES["instructions"]),
            source("preferences", "preference", texts, SHARES["preferences"]),
            *measured,
        ],
        "recall": [
            source("domain", "domain", texts, SHARES["domain"]),
            source("instructions", "instruction", out / "recalled", RECALLED["instructions"]),
            source("text", "general", out / "recalled", RECALLED["text"]),
        ],
    }
    if replay:
        mixtures["replay"] = [source("domain", "domain", texts, 1 - REPLAYED), *replay]
    for name, sources in mixtures.items():
        data = folder / name
        settings = {"tokenizer": str(base), "out": str(data), "seq_length": SEQ_LENGTH, "valid_fraction": 0.0}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**settings, "seed": SEED, "sources": sources}, sort_keys=False))
        run("preprocess", str(path))
    train = {
        "model": {"hf": str(base)},
        "data": {"mix": str(folder / "mixture" / "mix.json")},
        "train": {"steps": size.steps, **TRAIN},
        "eval": {"max_samples": size.validated},
        "checkpoint": {"every_minutes": 0.0, "keep": 1},
        "run_dir": str(folder / "run"),
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(train, sort_keys=False))
    for name, path in STUDIES.items():
        study = yaml.safe_load(path.read_text())
        if Path(study["base"]).parent.name == domain and put_back(RESULTS / name, folder / Path(study["out"]).name):
            print(f"finished runs that are kept with the project: {folder / Path(study['out']).name}")


def source(name: str, kind: str, texts: Path, weight: float | None) -> dict[str, Any]:
    """An entry of preprocess.yaml; without a weight it is only measured."""
    entry: dict[str, Any] = {"name": name, "kind": kind}
    if weight is not None:
        entry |= {"paths": [str(texts / f"{name}.jsonl")], "weight": weight}
    if (held_out := texts / f"{name}-heldout.jsonl").is_file():
        entry["heldout"] = [str(held_out)]
    if kind in ("domain", "general"):
        return entry | {"text": "{text}"}
    prompt = f"{QUESTION_PREFIX}{{{'instruction' if kind == 'instruction' else 'prompt'}}}{ANSWER_PREFIX}"
    answers = (
        {"response": " {response}"} if kind == "instruction" else {"chosen": " {chosen}", "rejected": " {rejected}"}
    )
    return entry | {"prompt": prompt, **answers, "separator": ""}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=("facts", "medquad"))
    parser.add_argument("--general", type=Path, metavar="FILE", help="real general text, JSONL with `text` or plain")
    parser.add_argument("--medquad", type=Path, metavar="FILE", help="the articles of the domain medquad, JSONL")
    parser.add_argument("--out", type=Path, default=RUNS, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        prepare(args.domain, args.general, args.medquad, args.out)
    except MixcptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
