"""What a run's record says is what happened: settings by the steps they were used for, validations without holes."""

import json
import os
import signal

import pytest
import yaml

from megatron_mixcpt.checkpoint import list_checkpoints
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.config.history import read_history, record_settings, told
from megatron_mixcpt.errors import StoppedError
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.train import saving
from megatron_mixcpt.train.loop import train
from tests.helpers.corpus import write_mix
from tests.train.runs import settings


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("record") / "data")


def run(mix, folder, **sections):
    train(validate(Config, settings(mix, folder, **sections), "test"))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_at(monkeypatch, number, *, training):
    """Ask this process to stop in the `number`-th pass of training (the first is the dry run), or of validation."""
    original, seen = ForwardBackward.__call__, [0]

    def wrapped(self, batches, *, forward_only=False):
        if forward_only is not training:
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches, forward_only=forward_only)

    monkeypatch.setattr(ForwardBackward, "__call__", wrapped)


def test_each_step_is_recorded_with_the_settings_it_was_taken_with(mix, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_at(patch, 3, training=True)
        run(mix, folder, train={"steps": 4, "lr": 1e-3})
    assert told(folder) == []
    capsys.readouterr()
    run(mix, folder, train={"steps": 4, "lr": 5e-4})
    assert "settings from step 3 on: train.lr 0.001 -> 0.0005" in capsys.readouterr().out
    assert told(folder) == ["from step 3 on: train.lr 0.001 -> 0.0005"]
    assert [entry["settings"]["train.lr"] for entry in read_history(folder)] == [1e-3, 5e-4]


def test_settings_that_were_tried_and_taken_back_are_not_in_the_record(tmp_path):
    def start(step, **values):
        config = {"model": {"preset": "nano"}, "data": {"mix": "m"}, "run_dir": "r", "train": {"steps": 9}}
        return record_settings(tmp_path, step, validate(Config, config | values, "test"))

    assert start(0) == []
    assert start(5, train={"steps": 9, "lr": 1e-3}) == ["train.lr 1e-05 -> 0.001"]
    assert start(5) == [] and told(tmp_path) == []
    added = start(7, data={"mix": "m", "weights": {"a": 0.5}}, forget={"budget": 0.1})
    assert added[0] == "data.weights.a None -> 0.5" and "forget.budget None -> 0.1" in added
    assert "data.weights.a 0.5 -> None" in start(8)


def test_the_record_of_a_finished_run_does_not_change(mix, tmp_path, capsys):
    folder = tmp_path / "run"
    run(mix, folder, train={"steps": 2, "lr": 1e-3})
    before = {name: (folder / name).read_bytes() for name in ("config.yaml", "settings.jsonl")}
    capsys.readouterr()
    run(mix, folder, train={"steps": 2, "lr": 5e-5})
    assert "nothing was done with train.lr 0.001 -> 5e-05" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in before} == before
    run(mix, folder, train={"steps": 3, "lr": 1e-3})
    assert told(folder) == ["from step 3 on: train.steps 2 -> 3"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 3


def test_the_history_of_a_run_without_one_begins_with_its_configuration(mix, tmp_path):
    folder = tmp_path / "run"
    run(mix, folder, train={"steps": 2, "lr": 1e-3})
    (folder / "settings.jsonl").unlink()
    run(mix, folder, train={"steps": 3, "lr": 5e-5})
    assert told(folder) == ["from step 3 on: train.steps 2 -> 3, train.lr 0.001 -> 5e-05"]


@pytest.mark.parametrize("training", [True, False], ids=["before a validation", "within a validation"])
def test_a_validation_that_a_stop_left_out_is_made_up(mix, tmp_path, monkeypatch, training):
    """Curves have no holes: each source is measured at steps 0, 2 and 4, whenever the stop came."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    sections = {"train": {"steps": 4}, "eval": {"every": 2}}
    run(mix, whole, **sections)
    measured = [(row["step"], {k: v for k, v in row.items() if k.startswith("val/")}) for row in rows(whole)]
    measured = [(step, values) for step, values in measured if values]
    assert [step for step, _ in measured] == [0, 2, 4]
    passes = len([row for row in measured[0][1] if row.endswith("/loss")])
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        # In the second step, or the last source of the validation after it.
        stop_at(patch, 3 if training else 2 * passes, training=training)
        run(mix, folder, **sections)
    run(mix, folder, **sections)
    again = [(row["step"], {k: v for k, v in row.items() if k.startswith("val/")}) for row in rows(folder)]
    assert [(step, values) for step, values in again if values] == measured


def test_a_run_saves_by_the_clock_too(mix, tmp_path, monkeypatch):
    """With a clock that passes 20 minutes a look and the default of 30, not every step is saved, but some are."""
    clock = iter(range(0, 10**9, 20 * 60))
    monkeypatch.setattr(saving, "monotonic", lambda: next(clock))
    folder = tmp_path / "run"
    run(mix, folder, train={"steps": 5}, checkpoint={"keep": 9})
    steps = [int(path.name.split("_")[1]) for path in list_checkpoints(folder / "checkpoints")]
    assert 5 in steps and 1 < len(steps) < 5
    monkeypatch.setattr(saving, "monotonic", lambda: 0.0)
    run(mix, tmp_path / "other", train={"steps": 5}, checkpoint={"keep": 9})
    assert len(list_checkpoints(tmp_path / "other" / "checkpoints")) == 1


def test_whoever_asks_to_stop_is_answered_at_once(mix, tmp_path, capfd, monkeypatch):
    with pytest.raises(StoppedError):
        stop_at(monkeypatch, 3, training=True)
        run(mix, tmp_path / "run", train={"steps": 4})
    said = capfd.readouterr().err
    assert "finishing step 2, then saving; ^C again stops now and loses 1 step since the last checkpoint" in said
