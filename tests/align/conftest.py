"""A prepared mixture with instructions and preference pairs, made once."""

import shutil
from pathlib import Path

import pytest

from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
from tests.data_prep.conftest import sentences, tokenizer_dir, write_jsonl
from tests.model.families import make

__all__ = ["tokenizer_dir"]

SEQ_LENGTH = 64


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A small random Llama with that tokenizer, made by transformers."""
    return _model("llama-untied", tmp_path_factory, tokenizer_dir)


@pytest.fixture(scope="session")
def experts_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A mixture of experts like it."""
    return _model("qwen3-experts", tmp_path_factory, tokenizer_dir)


def _model(family, tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("model") / "hf"
    shutil.copytree(tokenizer_dir, folder)
    make(family, folder, vocab_size=600, initializer_range=0.1, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="session")
def stage1(tmp_path_factory, tokenizer_dir) -> Path:
    """Folder of a mixture with one domain, one instruction and two preference sources."""
    folder = tmp_path_factory.mktemp("stage1")
    texts = sentences(400, seed=5, words=(3, 8))
    asked = [{"instruction": f"{texts[i]} {i}?", "response": texts[-i - 1]} for i in range(60)]
    pairs = [{"prompt": f"{texts[i]} {i}!", "chosen": texts[-i - 1], "rejected": texts[-i - 2]} for i in range(60, 100)]
    files = {
        "domain": write_jsonl(folder / "domain.jsonl", [{"text": text} for text in texts[300:]]),
        "asked": write_jsonl(folder / "asked.jsonl", asked),
        "pairs": write_jsonl(folder / "pairs.jsonl", pairs),
        "more": write_jsonl(folder / "more.jsonl", [{**pair, "prompt": pair["prompt"] + "!"} for pair in pairs[:15]]),
    }
    sides = {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}
    source = {
        "domain": {"kind": "domain", "text": "{text}", "weight": 0.4},
        "asked": {"kind": "instruction", "prompt": "{instruction}", "response": "{response}", "weight": 0.3},
        "pairs": {"kind": "preference", **sides, "weight": 0.2},
        "more": {"kind": "preference", **sides, "weight": 0.1},
    }
    values = {
        "tokenizer": str(tokenizer_dir),
        "out": str(folder / "data"),
        "seq_length": SEQ_LENGTH,
        "valid_fraction": 0.15,
        "sources": [{"name": name, "paths": [str(files[name])], **entry} for name, entry in source.items()],
    }
    preprocess(parse_config(values))
    return folder / "data"
