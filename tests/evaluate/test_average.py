"""Weight averages: exact arithmetic, types, ends, refusals; one report."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mixcpt.cli import main
from megatron_mixcpt.convert.average import average
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.evaluate.gci import Instance, write_instances
from tests.model.families import make


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    folder, family = tmp_path_factory.mktemp("average"), getattr(request, "param", "qwen2")
    make(family, folder / "base", shard_size="40KB")  # several shards
    model = make(family, folder / "tuned", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def tensors(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("pair", ["qwen2", "qwen3-experts"], indirect=True)  # tied; a mixture
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_tensor_is_the_fp32_average_in_the_tuned_type(pair, tmp_path, alpha):
    base, tuned = pair
    average(base, tuned, alpha, tmp_path / "out")
    first, second, found = tensors(base), tensors(tuned), tensors(tmp_path / "out")
    assert found.keys() == second.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        exact = (1 - alpha) * first[name].double() + alpha * second[name].double()
        # One rounding to bf16, of a value that fp32 has rounded before.
        torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=1e-6)
        if alpha == 1.0:
            assert torch.equal(value, second[name])
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_models_that_have_no_average_are_refused(pair, tmp_path):
    base, tuned = pair
    make("llama-untied", tmp_path / "other")
    with pytest.raises(ConfigError, match="not of one architecture"):
        average(base, tmp_path / "other", 0.5, tmp_path / "out")
    make("qwen2", tmp_path / "larger", vocab_size=320)
    with pytest.raises(ConfigError, match="one architecture and vocabulary"):
        average(base, tmp_path / "larger", 0.5, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        average(base, tuned, 0.5, tmp_path / "full")
    with pytest.raises(ConfigError, match="between 0"):
        average(base, tuned, 1.5, tmp_path / "out")


def test_what_a_model_stores_and_nobody_reads_is_no_difference(tmp_path):
    """A rotation, as Llama-2 has, and a copy of a tied output head."""
    make("qwen2", tmp_path / "base")
    make("qwen2", tmp_path / "tuned")
    stored = tensors(tmp_path / "base")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    average(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "tuned").keys()
    save_file(stored | {"lm_head.weight": 2 * stored["lm_head.weight"]}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(VerificationError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        average(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / "no")
    make("llama-untied", tmp_path / "untied")
    make("llama-untied", tmp_path / "headless")
    rest = {name: value for name, value in tensors(tmp_path / "headless").items() if name != "lm_head.weight"}
    save_file(rest, tmp_path / "headless" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"not of one architecture: lm_head\.weight is in one of them alone"):
        average(tmp_path / "untied", tmp_path / "headless", 0.5, tmp_path / "no")


def test_the_command_measures_ends_and_averages_in_one_report(hf_dir, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    shutil.copytree(hf_dir, tuned)
    weights = {name: value + 0.1 * torch.randn_like(value) for name, value in tensors(tuned).items()}
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    questions = tmp_path / "gci.jsonl"
    write_instances(questions, [Instance("1", "speech", "Speak.", {"none": ["zebra"]}, {"none": ["zebra"]})])
    out = tmp_path / "out"
    command = ["average", "--base", str(hf_dir), "--tuned", str(tuned), "--alpha", "0.25", "0.5"]
    assert main([*command, "--gci", str(questions), "--out", str(out)]) == 0
    report = (out / "average.md").read_text()
    assert "| skill | score | questions | base | 0.25 | 0.5 | tuned |" in report
    assert list(json.loads((out / "average.json").read_text())) == ["base", "0.25", "0.5", "tuned"]
    assert (out / "alpha-0.25" / "tokenizer.json").exists()
    assert main([*command, "--out", str(out)]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert main([*command, "--alpha", "2", "--no-eval", "--out", str(tmp_path / "other")]) == 2
