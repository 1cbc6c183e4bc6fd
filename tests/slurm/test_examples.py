"""The example configurations: `mixcpt plan` accepts them, and what they take fits the machines they name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config, load_config
from megatron_mixcpt.plan import make_plan
from megatron_mixcpt.slurm.chain import chain_jobs
from megatron_mixcpt.train.setup import check_settings
from tests.helpers.corpus import write_mix
from tests.slurm.published import CONFIGS, PARAMETERS

FOLDER = Path(__file__).parents[2] / "launch" / "configs"
EXAMPLES = {  # ranks, GiB of a device
    "smollm2-135m-cpu": (1, 8),
    "qwen2-7b-8gpu": (8, 80),
    "llama3-8b-8gpu": (8, 80),
    "llama3-8b-64gpu": (64, 80),
    "llama3-70b-64gpu": (64, 80),
}
CONTEXT_GIB = 4  # of CUDA, NCCL and fragmentation, which the plan does not count


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """The working directory that an example expects: its model and its data."""

    def make(name):
        values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        folder = tmp_path / values["model"]["hf"]
        folder.mkdir(parents=True)
        content = CONFIGS[folder.name]
        (folder / "config.json").write_text(json.dumps(content))
        mix = tmp_path / values["data"]["mix"]
        sizes = {"seq_length": values["data"]["seq_length"], "vocab_size": content["vocab_size"]}
        write_mix(mix.parent, train=2, valid=1, **sizes)
        monkeypatch.chdir(tmp_path)
        return folder.name

    return make


def test_every_training_example_is_tested():
    found = {path.stem for path in FOLDER.glob("*.yaml") if "run_dir" in yaml.safe_load(path.read_text())}
    assert found == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_plan_accepts_the_example_and_it_fits_its_devices(surroundings, capsys, name):
    model = surroundings(name)
    ranks, device = EXAMPLES[name]
    path = FOLDER / f"{name}.yaml"
    assert main(["plan", str(path), f"--nproc={ranks}"]) == 0
    shown = capsys.readouterr().out
    assert float(re.search(r"model +([0-9.]+) M parameters", shown)[1]) == pytest.approx(PARAMETERS[model], abs=0.1)
    config = load_config(Config, path)
    plan = make_plan(config, *check_settings(config, ranks), ranks)
    assert max(stage.total for stage in plan.stages) / 2**30 < device - CONTEXT_GIB, shown
    if config.train.dtype == "fp32":
        assert "H100" not in shown and "--peak-tflops" in shown
    else:
        assert f"h at 40% of {ranks} x H100" in shown


def test_a_disk_without_room_is_told_but_does_not_stop_a_plan(surroundings, capsys, monkeypatch):
    surroundings("llama3-70b-64gpu")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    path = FOLDER / "llama3-70b-64gpu.yaml"
    assert main(["plan", str(path), "--nproc=64"]) == 0
    assert "1.0 GiB are free here: too little" in capsys.readouterr().out
    assert main(["launch", str(path), "--nodes=8", "--dry-run"]) == 2
    assert "free some space" in capsys.readouterr().err


def test_the_gpu_s_bf16_peak_is_not_taken_for_fp32(surroundings, capsys):
    surroundings("smollm2-135m-cpu")
    path = FOLDER / "smollm2-135m-cpu.yaml"
    assert main(["plan", str(path), "--gpu=H100"]) == 2
    assert "train.dtype is fp32; give --peak-tflops" in capsys.readouterr().err
    assert main(["plan", str(path), "--peak-tflops=0.1"]) == 0
    assert "h at 40% of 1 x 0.1 TFLOP/s" in capsys.readouterr().out


def test_the_example_of_a_chain_is_valid(monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    stages = [job.stage for job in chain_jobs("launch/configs/two-stages/chain.yaml", {})]
    assert stages == ["preprocess-tokenize", "preprocess-assemble", "stage1", "select", "sft", "dpo", "export", "eval"]
