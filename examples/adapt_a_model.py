"""Adapt a Hugging Face model to texts of yours, from Python: what `mixcpt preprocess`, `train` and `export` do.

    python examples/adapt_a_model.py MODEL TEXTS.jsonl OUT

MODEL is a directory with a model and its tokenizer; every line of TEXTS.jsonl is `{"text": "..."}`.
"""

import sys
from pathlib import Path

from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.convert.export import export
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.train.loop import train


def adapt(model: Path, texts: Path, out: Path, *, steps: int = 20, seq_length: int = 128) -> Path:
    """Write data, run and model below `out`; called again, goes on where it stopped. Returns the model's directory."""
    source = {"name": "mine", "kind": "domain", "paths": [str(texts)], "text": "{text}", "weight": 1.0}
    sizes = {"seq_length": seq_length, "valid_fraction": 0.1}
    mix = preprocess(parse_config({"tokenizer": str(model), "out": str(out / "data"), "sources": [source], **sizes}))
    config = {
        "model": {"hf": str(model)},
        "data": {"mix": str(mix)},
        "train": {"steps": steps, "micro_batch_size": 2, "global_batch_size": 8, "lr": 1e-3, "dtype": "fp32"},
        "run_dir": str(out / "run"),
    }
    train(validate(Config, config, "examples/adapt_a_model.py"))
    export(out / "run", out / "model")
    return out / "model"


if __name__ == "__main__":
    print(adapt(*map(Path, sys.argv[1:])))
