"""Runs that trained adapters: exported merged and apart, gone on from, generated from and evaluated."""

import json
import shutil

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from megatron_mixcpt.adapters.files import read_directory
from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.cli import main
from megatron_mixcpt.hf_alora import load_alora
from megatron_mixcpt.huggingface.config import architecture_from_hf
from tests.model.adapter_models import METHODS, TOKENS, our_logits
from tests.model.families import make, make_with_mix, read_all

STARTS = {
    "more": "lora",  # goes on with its adapters
    "full": "lora",  # into which they are merged
    "full of more": "more",
    "wide": "more",  # adapters of another rank: those before are merged
    "back": "wide",  # and again of the first rank
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base model, a mixture, and runs of two steps: `lora`, `alora`, and those of STARTS, which start from others."""
    folder = tmp_path_factory.mktemp("runs")
    mix = make_with_mix("qwen2", folder / "base", folder / "data", initializer_range=0.1)
    for name, start in (("lora", None), ("alora", None), ("imported", None), *STARTS.items()):
        method = "alora" if name == "alora" else "lora"
        config = {
            "model": {"checkpoint": str(folder / start)} if start else {"hf": str(folder / "base")},
            "data": {"mix": str(mix)},
            "train": {"steps": 2, "global_batch_size": 2, "lr": 3e-2, "schedule": "constant", "dtype": "fp32"},
            "teacher": {"source": "adapter_off"},
            "adapter": {"method": method, "rank": 4, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]},
            "run_dir": str(folder / name),
        }
        if name == "imported":
            assert main(["export", str(folder / "lora"), "--adapter", "--out", str(folder / "exported")]) == 0
            config["adapter"]["init"] = str(folder / "exported")
        if name == "wide":
            config["adapter"]["rank"] = 8
        if name.startswith("full"):
            del config["adapter"], config["teacher"]
            config["train"]["lr"] = 1e-9
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert main(["train", str(folder / f"{name}.yaml")]) == 0
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS % model.config.vocab_size).logits


@pytest.mark.parametrize("name", ["lora", "more"])
def test_a_run_is_exported_merged_and_as_peft_adapter_with_the_same_logits(runs, tmp_path, name):
    run = runs / name
    assert main(["export", str(run), "--out", str(tmp_path / "merged")]) == 0
    assert main(["export", str(run), "--adapter", "--out", str(tmp_path / "adapter")]) == 0
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(runs / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(runs / "base")
    before = logits(base)
    beside = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(beside, merged, rtol=1e-5, atol=1e-5 * merged.abs().max().item())
    assert (merged - before).abs().max() > 1e-3 * merged.abs().max()
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    inside, outside = (
        load_file(folder / "adapter_model.safetensors") for folder in (checkpoint / "adapter", tmp_path / "adapter")
    )
    assert inside.keys() == outside.keys() and all(torch.equal(inside[key], outside[key]) for key in inside)
    assert "trainable parameters" in (tmp_path / "merged/README.md").read_text()
    assert (tmp_path / "adapter/tokenizer.json").is_file()


def test_a_run_without_adapters_starts_from_the_merged_weights(runs, tmp_path):
    """`full` trained all weights from `lora` with a vanishing learning rate."""
    for name in ("lora", "full"):
        assert main(["export", str(runs / name), "--out", str(tmp_path / name)]) == 0
    expected, found = read_all(tmp_path / "lora"), read_all(tmp_path / "full")
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.distributed
def test_lora_of_some_projections_is_merged_where_tensor_ranks_share_a_group_of_queries(tmp_path):
    mix = make_with_mix("qwen2", tmp_path / "base", tmp_path / "data", num_key_value_heads=1, initializer_range=0.1)
    for name, start, ranks in (("lora", {"hf": "base"}, 1), ("full", {"checkpoint": "lora"}, 2)):
        config = {
            "model": {key: str(tmp_path / value) for key, value in start.items()},
            "data": {"mix": str(mix)},
            "parallel": {"tensor": ranks},
            "train": {"steps": 1, "global_batch_size": 2, "lr": 3e-2 if ranks == 1 else 1e-9, "dtype": "fp32"},
            "loss": {"target": "none"},
            "run_dir": str(tmp_path / name),
        }
        if ranks == 1:
            config["adapter"] = {"method": "lora", "rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert main(["train", str(tmp_path / f"{name}.yaml"), "--nproc", str(ranks)]) == 0
        assert main(["export", str(tmp_path / name), "--out", str(tmp_path / f"{name}-hf")]) == 0
    expected, found = read_all(tmp_path / "lora-hf"), read_all(tmp_path / "full-hf")
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


def test_alora_is_not_merged_and_says_why(runs, tmp_path, capsys):
    assert main(["export", str(runs / "alora"), "--out", str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert "cannot be merged" in error and "preceding tokens" in error and "--adapter" in error
    assert not (tmp_path / "merged").exists()


def test_alora_is_exported_for_transformers(runs, tmp_path):
    assert main(["export", str(runs / "alora"), "--adapter", "--out", str(tmp_path / "out")]) == 0
    adapter = METHODS["lora"].model_copy(
        update={"method": "alora", "rank": 4, "alpha": 32.0, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    )
    arch = architecture_from_hf(runs / "base")
    tensors = read_directory(tmp_path / "out", arch, adapter)
    assert set(tensors) == {linear.key(name) for linear in adapted_linears(arch, adapter) for name in linear.tensors()}
    expected = our_logits(runs / "base", adapter, tensors, TOKENS % arch.vocab_size)
    with torch.no_grad():
        found = load_alora(tmp_path / "out")(TOKENS % arch.vocab_size).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (tmp_path / "out/hf_alora.py").is_file()


def validations(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows if "val/facts/ppl" in row]


def test_a_run_that_imports_an_adapter_starts_where_that_one_ended(runs):
    assert validations(runs / "imported")[0] == pytest.approx(validations(runs / "lora")[-1])
    assert validations(runs / "imported")[-1] != validations(runs / "lora")[-1]


@pytest.mark.parametrize("name, start", STARTS.items())
def test_a_run_starts_where_the_one_that_it_names_ended_whatever_that_one_started_from(runs, tmp_path, name, start):
    assert validations(runs / name)[0] == pytest.approx(validations(runs / start)[-1], rel=1e-5)
    assert main(["export", str(runs / name), "--out", str(tmp_path / "model")]) == 0
    words = ["--base", str(runs / "base"), "--mix", str(runs / "data/mix.json"), "--out", str(tmp_path / "eval")]
    assert main(["eval", str(tmp_path / "model"), *words]) == 0
    for source in json.loads((tmp_path / "eval/eval.json").read_text())["model"]["sources"]:
        assert source["value"] == pytest.approx(validations(runs / name)[-1][f"val/{source['name']}/ppl"], rel=1e-5)


def test_weights_that_changed_under_an_adapter_are_noticed(runs, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(runs / "lora", moved)
    make("qwen2", tmp_path / "other", vocab_size=transformers.AutoConfig.from_pretrained(runs / "base").vocab_size)
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["model"]["hf"] = str(tmp_path / "other")
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    for command in (
        ["export", str(moved), "--out", str(tmp_path / "out")],
        ["eval", str(moved), "--out", str(tmp_path)],
    ):
        assert main(command) == 3
        assert "trained from other weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lora", "alora", "imported"])
def test_generate_and_eval_take_such_a_run(runs, tmp_path, capsys, name):
    capsys.readouterr()
    assert main(["generate", str(runs / name), "--prompt", "abc", "--max-new-tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert main(["export", str(runs / name), *(["--adapter"] * (name == "alora")), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "abc", "--max-new-tokens", "5"]) == 0
    assert text.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    assert main(["eval", str(runs / name), "--out", str(tmp_path / "eval")]) == 0
    found = json.loads((tmp_path / "eval/eval.json").read_text())
    for side, index in (("base", 0), ("model", -1)):
        row = validations(runs / ("lora" if side == "base" else name))[index]
        for source in found[side]["sources"]:
            assert source["value"] == pytest.approx(row[f"val/{source['name']}/ppl"], rel=1e-6)


def test_mistakes_with_adapters_are_told(runs, tmp_path, capsys):
    for arguments, message in (
        (["export", str(runs / "full"), "--adapter", "--out", str(tmp_path / "a")], "no adapter"),
        (["export", str(runs / "lora"), "--adapter", "--dtype", "bf16", "--out", str(tmp_path / "a")], "--dtype"),
        (["train", str(runs / "lora.yaml"), "adapter.rank=8", "train.steps=3"], "rank=4"),
        (["train", str(runs / "more.yaml"), f"adapter.init={runs}", f"run_dir={tmp_path}/r"], "adapter_config.json"),
        (
            ["train", str(runs / "more.yaml"), f"model.checkpoint={runs}/alora", f"run_dir={tmp_path}/r"],
            "cannot be merged",
        ),
    ):
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
