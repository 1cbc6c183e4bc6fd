"""A small study: a random Llama, a mixture of a domain and instructions, two arms."""

import yaml

from tests.helpers.corpus import write_mix
from tests.model.families import make


def write_material(folder):
    """Write a model, a mixture and a training file into `folder`; returns it."""
    make("llama-untied", folder / "hf")
    write_mix(folder / "data", num_domain=60, seq_length=16)
    train = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 4, "lr": 1e-3, "dtype": "fp32"}
    values = {"model": {"hf": str(folder / "hf")}, "data": {"mix": str(folder / "data" / "mix.json")}}
    (folder / "train.yaml").write_text(yaml.safe_dump({**values, "train": train, "run_dir": "unused"}))
    return folder


def study_file(material, folder, **changed):
    """Write `folder`/study.yaml, whose results go to `folder`/out, with some keys changed (None: left out)."""
    values = {
        "base": str(material / "train.yaml"),
        "arms": {"ce": {"loss.target": "none"}, "mixcpt": {}},
        "lr": [1e-3, 1e-2],
        "seeds": [1, 2],
        "average": [0.5],
        "choose": {"within": {"forgetting": 0.5}},
        "out": str(folder / "out"),
    } | changed
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return str(path)
