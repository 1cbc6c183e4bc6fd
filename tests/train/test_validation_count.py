"""`mixcpt plan` counts the passes over held-out text that a run really makes."""

import pytest

from megatron_mixcpt.architecture.architecture import PRESETS
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.data.mix import read_mix
from megatron_mixcpt.train import loop, validation
from megatron_mixcpt.train.validation_count import num_validations, validated_sequences
from tests.helpers.corpus import write_mix
from tests.helpers.nano import NANO
from tests.train.runs import settings

RUNS = {
    "without": {"eval": {"every": 0, "max_samples": "all"}},
    "eval.every": {"eval": {"every": 5, "max_samples": 4}},
    "a budget": {"eval": {"every": 5, "max_samples": 4}, "forget": {"budget": 5.0, "every": 4}},
    "a budget with saving and averages": {
        "eval": {"every": 0, "max_samples": 4},
        "checkpoint": {"every": 3},
        "forget": {"budget": 5.0, "every": 4, "average": True},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_counts_what_a_run_measures(name, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", NANO)
    mix = write_mix(tmp_path / "data", seq_length=16, vocab_size=64, train=32, valid=6, weights=(0.5, 0.5))
    train = {"steps": 10, "global_batch_size": 2, "micro_batch_size": 2}
    loss = {"target": "plain", "by_kind": {}}
    values = settings(mix, tmp_path / "run", **{"model": {"preset": "nano"}, "train": train, "loss": loss} | RUNS[name])
    config = validate(Config, values, "test")
    made, measured = validation.validate, []

    def counted(*args, items=None, **options):
        items = {} if items is None else items
        result = made(*args, items=items, **options)
        measured.append(sum(map(len, items.values())))
        return result

    monkeypatch.setattr(validation, "validate", counted)
    loop.train(config)
    assert measured == [validated_sequences(config, read_mix(mix))] * num_validations(config)
