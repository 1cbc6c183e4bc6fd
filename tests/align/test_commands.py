"""The commands around a run, with configurations of `mixcpt align`."""

import re

import pytest
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config, load_config
from megatron_mixcpt.plan.estimate import make_plan
from megatron_mixcpt.train.setup import check_settings
from tests.align.conftest import SEQ_LENGTH


@pytest.fixture
def written(tmp_path, stage1):
    """Configuration files: `train`, `sft` and `dpo`, alike but for the section `align`."""
    values = {
        "model": {"preset": "tiny"},
        "data": {"mix": str(stage1 / "mix.json")},
        "train": {"steps": 4, "micro_batch_size": 2, "global_batch_size": 4, "dtype": "fp32"},
        "loss": {"target": "none"},
        "run_dir": str(tmp_path / "run"),
    }
    sections = {"train": {}, "sft": {"align": {"method": "sft"}}, "dpo": {"align": {"method": "dpo"}}}
    for name, section in sections.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values | section))
    return {name: str(tmp_path / f"{name}.yaml") for name in sections}


def memory(shown):
    """The columns of the first stage."""
    header, row = (re.search(rf"^{begin} .*$", shown, re.MULTILINE)[0].split() for begin in ("stage", "0"))
    return dict(zip(header, map(float, row)))


def activations(path):
    config = load_config(Config, path)
    return make_plan(config, *check_settings(config, 1), 1).stages[0].activations


def test_a_plan_counts_preferences_in_rows_of_two_sequences_and_fine_tuning_as_training(written, capsys):
    shown = {}
    for name, path in written.items():
        assert main(["plan", path]) == 0
        shown[name] = capsys.readouterr().out
    assert shown["sft"] == shown["train"]
    assert f"2 x {SEQ_LENGTH} tokens" in shown["train"] and f"2 x {2 * SEQ_LENGTH} tokens" in shown["dpo"]
    train, dpo = memory(shown["train"]), memory(shown["dpo"])
    assert dpo["teacher"] == 0 and dpo["weights"] == train["weights"]
    assert activations(written["dpo"]) >= 2 * activations(written["train"]) > 0  # bytes: what is shown is rounded
    # Training draws from everything, DPO from the pairs alone.
    train, dpo = shown["train"], shown["dpo"]
    assert "(domain): " in train and "(domain): " not in dpo and "pairs (preference): " in dpo


@pytest.mark.parametrize("name", ["train", "sft", "dpo"])
def test_a_job_runs_the_command_whose_configuration_it_is(written, capsys, name):
    assert main(["launch", written[name], "--gpus-per-node", "0", "--dry-run"]) == 0
    command = "train" if name == "train" else "align"
    assert re.search(rf"\b{command} \S*/launch/{command}.yaml", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["train", "rehearse"])
def test_a_configuration_of_another_command_is_named(written, capsys, command):
    assert main([command, written["sft"]]) == 2
    assert "configuration of `mixcpt align`" in capsys.readouterr().err
    assert main(["align", written["train"]]) == 2
    assert "configuration of `mixcpt train`" in capsys.readouterr().err
