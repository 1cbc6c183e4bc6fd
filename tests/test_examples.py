"""The programs of examples/ do what they say."""

import importlib.util
import json
import shutil
from pathlib import Path

import torch

from megatron_mixcpt.evaluate.loading import load_directory
from tests.data_prep.conftest import sentences, tokenizer_dir, write_jsonl
from tests.helpers.spawn import run_distributed
from tests.model.families import make

__all__ = ["tokenizer_dir"]

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_with_its_former_self_as_teacher_a_model_learns_and_forgets_less():
    found = load("lssd_in_a_loop").main()
    domain, general = ({name: values[i] for name, values in found.items()} for i in range(2))
    assert max(domain["cross entropy"], domain["with LSSD"]) < domain["before"] / 4
    forgotten = {name: general[name] - general["before"] for name in ("cross entropy", "with LSSD")}
    assert 0 < forgotten["with LSSD"] < 0.75 * forgotten["cross entropy"]


def adapt(rank, world_size, *arguments):
    """In a process of its own: training sets up process groups and seeds."""
    return load("adapt_a_model").adapt(*arguments, steps=4, seq_length=32)


def test_a_model_is_adapted_from_python(tmp_path, tokenizer_dir):
    assert len((EXAMPLES / "adapt_a_model.py").read_text().splitlines()) < 40
    base = shutil.copytree(tokenizer_dir, tmp_path / "base")
    make("llama-untied", base, vocab_size=600)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(200)])
    (out,) = run_distributed(adapt, 1, base, texts, tmp_path / "out")
    model, tokenizer = load_directory(out)
    before, _ = load_directory(base)
    tokens = tokenizer(sentences(1, seed=9), return_tensors="pt")
    with torch.no_grad():
        losses = [one(**tokens, labels=tokens["input_ids"]).loss.item() for one in (before, model)]
    assert losses[1] < losses[0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4
