"""Stopping and resuming changes nothing: k + k steps against 2k, in every layout, and signals in real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from megatron_mixcpt.checkpoint import list_checkpoints
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.train.loop import train
from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.train.runs import keep_only_step, losses, saved_tensors, settings


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("resume") / "data")


def write_config(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


ALORA = {"adapter": {"method": "alora", "rank": 8, "heads": 2}, "teacher": {"source": "adapter_off"}}
LORA = {"adapter": {"method": "lora", "rank": 4, "dropout": 0.2}, "teacher": {"source": "adapter_off"}}
LAYOUTS = {
    "one process": (1, {}),
    "bf16": (1, {"train": {"dtype": "bf16"}}),
    "TP2 SP": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "PP2": (2, {"parallel": {"pipeline": 2}}),
    "DP2 distributed optimizer": (2, {"train": {"distributed_optimizer": True}}),
    "DP2 bf16 distributed optimizer": (2, {"train": {"distributed_optimizer": True, "dtype": "bf16"}}),
    "ALoRA": (1, ALORA),
    "LoRA with dropout, TP2 SP": (2, LORA | {"parallel": {"tensor": 2, "sequence": True}}),
}
# name -> (layout that wrote the checkpoint, layout that goes on)
RESHARDED = {
    "TP2": ("one process", {"parallel": {"tensor": 2}}),
    "PP2": ("one process", {"parallel": {"pipeline": 2}}),
    "DP2 distributed optimizer": ("one process", {"train": {"distributed_optimizer": True}}),
    "ALoRA TP2 SP": ("ALoRA", ALORA | {"parallel": {"tensor": 2, "sequence": True}}),
    "ALoRA PP2": ("ALoRA", ALORA | {"parallel": {"pipeline": 2}}),
}


def _train_all(rank, world_size, runs):
    """Run `[(port, configuration), ...]` one after the other, as `mixcpt train` would."""
    for port, values in runs:
        os.environ["MASTER_PORT"] = str(port)
        train(validate(Config, values, "test"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mix):
    """Folder of runs `<layout>/straight` and `<layout>/broken`, the latter resumed once more from its step 2."""
    folder = tmp_path_factory.mktemp("runs")

    def values(layout, run, sections):
        return settings(mix, folder / layout / run, checkpoint={"every": 2, "keep": 5}, **sections)

    for world_size in (1, 2):
        chosen = {name: sections for name, (size, sections) in LAYOUTS.items() if size == world_size}
        first = [(free_port(), values(name, run, s)) for name, s in chosen.items() for run in ("straight", "broken")]
        run_distributed(_train_all, world_size, first, timeout=300)
        for name in chosen:
            keep_only_step(folder / name / "broken", 2)
        second = [(free_port(), values(name, "broken", sections)) for name, sections in chosen.items()]
        if world_size == 2:
            for name, (source, sections) in RESHARDED.items():
                target = folder / name / "resharded" / "checkpoints"
                shutil.copytree(folder / source / "straight" / "checkpoints", target)
                keep_only_step(target.parent, 2)
                second.append((free_port(), values(name, "resharded", sections)))
        run_distributed(_train_all, world_size, second, timeout=300)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_bitwise(runs, layout):
    straight, broken = runs / layout / "straight", runs / layout / "broken"
    assert losses(broken) == losses(straight)
    assert sorted(losses(broken)) == [1, 2, 3, 4]
    expected, found = (saved_tensors(list_checkpoints(run / "checkpoints")[0]) for run in (straight, broken))
    assert expected.keys() == found.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in expected)
    assert any(key.startswith("optimizer.state.fp32_param.") for key in expected) == ("bf16" in layout)
    assert all("adapter." in key for key in expected) == ("LoRA" in layout)  # the frozen weights are not saved
    for key in expected:
        assert torch.equal(expected[key], found[key]), key


@pytest.mark.distributed
@pytest.mark.parametrize("layout", RESHARDED)
def test_a_checkpoint_resumes_in_another_layout(runs, layout):
    """From step 2 of one process; the losses go on as if nothing had changed."""
    expected, found = losses(runs / RESHARDED[layout][0] / "straight"), losses(runs / layout / "resharded")
    np.testing.assert_allclose([found[step] for step in (3, 4)], [expected[step] for step in (3, 4)], rtol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGUSR1])
def test_a_signal_to_the_launcher_saves_and_exits_with_75(tmp_path, mix, number):
    """Two ranks in the middle of training; no step is lost. Signals to the ranks: tests/faults/test_signals.py."""
    values = settings(mix, tmp_path / "run", train={"steps": 400}, checkpoint={"every": 0})
    config = write_config(tmp_path / "train.yaml", values)
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_mixcpt.cli", "train", str(config), "--nproc", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and "train/loss" in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, output + errors
    assert "run the same command to go on" in errors and errors.count("stopped at step") == 1
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == max(losses(tmp_path / "run"))
