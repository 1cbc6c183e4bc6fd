"""The example configurations: `mixcpt plan` accepts them, and what they take fits the machines they name."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.architecture.shapes import SHAPES
from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config, load_config
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.plan.estimate import make_plan
from megatron_mixcpt.train.setup import check_settings
from tests.helpers.corpus import write_mix
from tests.slurm.published import CONFIGS, PARAMETERS

FOLDER = Path(__file__).parents[2] / "launch" / "configs"
EXAMPLES = {  # ranks, GiB of a device
    "smollm2-135m-cpu": (1, 8),
    "gemma3-4b-8gpu": (8, 80),
    "qwen2-7b-8gpu": (8, 80),
    "qwen2-7b-mol-8gpu": (8, 80),
    "qwen2-7b-replay-8gpu": (8, 80),
    "llama3-8b-8gpu": (8, 80),
    "llama3-8b-64gpu": (64, 80),
    "llama3-8b-64k-64gpu": (64, 80),
    "llama3-70b-64gpu": (64, 80),
    "qwen3-30b-a3b-64gpu": (64, 80),
}
README = FOLDER.parent / "README.md"
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
    fullest = max(stage.total for stage in plan.stages) / 2**30
    assert fullest < device - CONTEXT_GIB, shown
    assert re.search(rf"\(configs/{name}\.yaml\).* \| {fullest:.1f} \|$", README.read_text(), re.MULTILINE), fullest
    if config.train.dtype == "fp32":
        assert "H100" not in shown and "--peak-tflops" in shown
    else:
        assert f"h at 40% of {ranks} x H100" in shown


@pytest.mark.parametrize(("name", "model"), zip(SHAPES, CONFIGS, strict=True))
def test_published_shapes_are_those_of_their_config_json(tmp_path, name, model):
    assert re.sub(r"^meta-|(?<=llama)-", "", model.lower()) == name
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[model]))
    theirs = architecture_from_hf(tmp_path)
    numbers = dataclasses.replace(
        theirs,
        **{key: getattr(SHAPES[name], key) for key in ("model_type", "norm_eps", "rope_theta", "rope_scaling")},
    )
    assert SHAPES[name] == numbers  # what memory and time do not depend on left aside
    assert SHAPES[name].num_parameters / 1e6 == pytest.approx(PARAMETERS[model], abs=0.1)


@pytest.mark.parametrize(("name", "shape"), [("llama3-8b-8gpu", "llama3-8b"), ("llama3-70b-64gpu", "llama3-70b")])
def test_an_example_is_planned_the_same_without_model_and_data(
    surroundings, capsys, tmp_path, monkeypatch, name, shape
):
    command = ["plan", str(FOLDER / f"{name}.yaml"), f"--nproc={EXAMPLES[name][0]}"]
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2  # there is nothing here
    assert main([*command, "--model-shape", shape, "--tokens", "2e9", "--gpu", "h100-80g"]) == 0
    alone = capsys.readouterr().out
    assert "room        fits: " in alone and "x 2000000000 tokens" in alone
    surroundings(name)
    assert main(command) == 0

    def memory(shown):
        return re.search(r"memory of a rank.*?while saving", shown, re.DOTALL)[0]

    assert memory(capsys.readouterr().out) == memory(alone)


@pytest.mark.parametrize("memory", ["25", "20", "10"])
def test_what_does_not_fit_is_told_with_keys_that_make_it_fit(capsys, memory):
    command = ["plan", str(FOLDER / "llama3-8b-8gpu.yaml"), "--nproc=8", "--memory", memory]
    command += ["--model-shape", "llama3-8b", "--tokens", "1e9"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"does not fit: [0-9.]+ of {memory} GiB", shown)
    found = re.findall(r"^ +with (.+): [0-9.]+ GiB$", shown, re.MULTILINE)
    assert found
    for keys in found:
        assert main([*command[:2], *keys.split(), *command[2:]]) == 0
        assert "room        fits: " in capsys.readouterr().out, keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "abacus-8g"), "--gpu abacus-8g: known are"),
        (("--model-shape", "llama9"), "--model-shape llama9: neither a folder with a config.json nor one of"),
        (("--model-shape", "llama3-8b", "--tokens", "0.5"), "--tokens 0.5: at least 1"),
        (("--model-shape", "llama3-8b", "--tokens", "1e9", "data.seq_length=null"), "set data.seq_length=N"),
    ],
)
def test_what_cannot_be_assumed_is_refused(capsys, options, message):
    assert main(["plan", str(FOLDER / "llama3-8b-8gpu.yaml"), "--nproc=8", *options]) == 2
    assert message in capsys.readouterr().err


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


@pytest.fixture
def two_stages(tmp_path, monkeypatch):
    """Path of the example of a chain, in a folder of its own with the base model that it needs."""
    shutil.copytree(FOLDER / "two-stages", tmp_path / "launch" / "configs" / "two-stages")
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text(json.dumps(CONFIGS["Qwen2-7B"]))
    monkeypatch.chdir(tmp_path)
    return Path("launch/configs/two-stages/chain.yaml")


def test_a_dry_run_of_the_example_shows_the_chain_before_its_scripts(two_stages, capsys):
    assert main(["launch", str(two_stages), "--dry-run"]) == 0
    table, *scripts = capsys.readouterr().out.split("\n######## ")
    rows = [re.split("  +", line) for line in table.strip().splitlines()]
    stages = ["preprocess-tokenize", "preprocess-assemble", "stage1", "select", "sft", "dpo", "export", "eval"]
    assert [row[0] for row in rows] == ["job", *stages]
    assert [row[3] for row in rows[1:]] == ["-", *stages[:-1]]
    assert rows[1][1] == "16 tasks"
    assert rows[3][1:] == ["2 x 8 GPUs", "1-00:00:00", "preprocess-assemble", f"train {two_stages.parent}/stage1.yaml"]
    assert rows[7][1:3] == ["1 x CPU", "04:00:00"] and "#SBATCH --partition=cpu" in scripts[6]
    for stage, script in zip(stages, scripts, strict=True):
        path, first, *_ = script.splitlines()
        assert path.endswith(f"/{stage}.sbatch") and first == "#!/bin/bash"


@pytest.mark.parametrize(
    ("file", "old", "new", "stage", "message"),
    [
        ("sft", "tensor: 4", "tensor: 5", "sft", "parallel.tensor=5 x parallel.pipeline=1 needs a multiple of 5 proc"),
        ("select", "tensor: 4", "tensor: 3", "select", "nodes x GPUs a node"),
        ("stage1", "tensor: 4", "tensor: 8", "stage1", "parallel.tensor=8 cannot cut this model"),
        (
            "stage1",
            "global_batch_size: 64",
            "global_batch_size: 66",
            "stage1",
            "is not a multiple of train",
        ),
        ("stage1", "models/base", "models/bose", "stage1", "models/bose"),
        ("select", None, None, "select", "select.yaml: no such configuration file"),
        ("preprocess", None, None, "preprocess", "preprocess.yaml"),
        ("preprocess", "seq_length:", "seq_lenght:", "preprocess", "seq_lenght"),
        ("chain", "--base models", "--bose models", "eval", "unrecognized arguments: --bose models/base"),
        ("chain", "--out work/aligned", "--ouput work/aligned", "export", "are required: --out"),
    ],
)
def test_a_chain_with_a_stage_that_cannot_run_is_refused(two_stages, capsys, file, old, new, stage, message):
    path = two_stages.with_name(f"{file}.yaml")
    if old is None:
        path.unlink()
    else:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    assert main(["launch", str(two_stages), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert f"stage {stage}: " in error and message in error


def test_a_model_that_an_earlier_stage_writes_need_not_be_there(two_stages, capsys):
    values = yaml.safe_load(two_stages.read_text())
    export, again = {"name": "hf", "command": "export runs/x --out work/hf"}, {"name": "again"}
    again["command"] = f"train {two_stages.parent}/stage1.yaml model.hf=work/hf"
    for stages, code in (([export, again], 0), ([again, export], 2)):
        two_stages.write_text(yaml.safe_dump(values | {"stages": stages}))
        assert main(["launch", str(two_stages), "--dry-run"]) == code
    assert "work/hf" in capsys.readouterr().err
