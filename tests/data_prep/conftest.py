"""Small real tokenizers and text for the data tests, made on the spot."""

import json
import random
from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "the liver of a patient with chronic disease is often enlarged and its treatment may include surgery or drugs that "
    "reduce inflammation while children rarely show symptoms before the age of twelve in most studies naïve café 東京"
)
WORDS = TEXT.split()


def sentences(count: int, seed: int = 0, words: tuple[int, int] = (5, 40)) -> list[str]:
    """Deterministic pseudo-English of varying length."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(*words))).capitalize() + "." for _ in range(count)]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level BPE of a few hundred entries with ChatML control tokens, as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(300), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def corpus(tmp_path) -> dict[str, Path]:
    """One file of each kind."""
    texts = sentences(400, seed=1, words=(3, 300))
    short = sentences(800, seed=2, words=(3, 20))
    return {
        "domain": write_jsonl(tmp_path / "domain.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)]),
        "instruction": write_jsonl(
            tmp_path / "instruction.jsonl",
            [{"instruction": short[i] + f" {i}?", "response": short[-i - 1]} for i in range(200)],
        ),
        "preference": write_jsonl(
            tmp_path / "preference.jsonl",
            [{"prompt": short[i] + f" {i}!", "chosen": short[-i - 1], "rejected": short[-i - 2]} for i in range(100)],
        ),
    }


@pytest.fixture
def config_values(tmp_path, tokenizer_dir, corpus) -> dict:
    """The example of architecture: three sources of three kinds."""
    return {
        "tokenizer": str(tokenizer_dir),
        "out": str(tmp_path / "out"),
        "seq_length": 128,
        "valid_fraction": 0.1,
        "seed": 7,
        "sources": [
            {"name": "docs", "kind": "domain", "paths": [str(corpus["domain"])], "text": "{text}", "weight": 0.7},
            {
                "name": "ask",
                "kind": "instruction",
                "paths": [str(corpus["instruction"])],
                "prompt": "{instruction}",
                "response": "{response}",
                "weight": 0.2,
            },
            {
                "name": "pairs",
                "kind": "preference",
                "paths": [str(corpus["preference"])],
                "prompt": "{prompt}",
                "chosen": "{chosen}",
                "rejected": "{rejected}",
                "weight": 0.1,
            },
        ],
    }
