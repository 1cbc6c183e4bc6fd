"""`mixcpt convert` and `mixcpt export` from the command line: bits, layouts, tokenizers, and every refusal."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.convert_cpu import write_model
from megatron_mixcpt.cli import main
from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.huggingface.tokenizers import extended_vocab_size
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.exporting import export_model
from tests.helpers.spawn import run_distributed
from tests.model.families import FAMILIES, assert_same_bits, make, make_tokenizer, read_all
from tests.model.grid import TIED, TINY


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    size = make_tokenizer(folder)
    make("llama-untied", folder, vocab_size=size)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_convert_and_export_keep_every_bit(name, tmp_path, capsys):
    make(name, tmp_path / "in", dtype=torch.bfloat16, shard_size="30KB")
    assert main(["convert", "--hf", str(tmp_path / "in"), "--out", str(tmp_path / "ckpt")]) == 0
    assert main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 0
    assert_same_bits(tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "in", "out"]  # nothing half-made is left
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()) and model.dtype == torch.bfloat16


def load_whole(checkpoint, source, tensor, pipeline):
    """Whether this rank's shard from the checkpoint equals the one read from the Hugging Face directory."""
    with parallel_context(tensor=tensor, pipeline=pipeline):
        from megatron_mixcpt.checkpoint.start import load_model_weights
        from megatron_mixcpt.huggingface.config import architecture_from_hf
        from megatron_mixcpt.model.build import build_gpt
        from megatron_mixcpt.model.load import load_hf

        arch = architecture_from_hf(source)
        converted, direct = build_gpt(arch, seed=None), build_gpt(arch, seed=None)
        for slot in converted.slots():
            limit = max(arch.vocab_size - direct.vocab_start, 0) if slot.shape[0] == arch.vocab_size else None
            slot.parameter.data[:limit] = float("nan")
        load_model_weights(converted, checkpoint)
        load_hf(direct, source)
        # The padding, which the checkpoint does not hold, is zero in both.
        return all(torch.equal(ours, theirs) for ours, theirs in zip(converted.parameters(), direct.parameters()))


def load_wholes(rank, world_size, cases):
    return [load_whole(*case) for case in cases]


@pytest.mark.distributed
def test_a_converted_checkpoint_loads_into_any_layout(tmp_path):
    cases = []
    for name in ("llama-tied-llama3", "qwen2", "olmo3", "phi4-mini", "gemma3", "mixtral", "qwen3-experts"):
        source, checkpoint = tmp_path / name / "in", tmp_path / name / "ckpt"
        make(name, source)
        assert main(["convert", "--hf", str(source), "--out", str(checkpoint)]) == 0
        assert load_whole(checkpoint, source, 1, 1)
        cases += [(checkpoint, source, 2, 1), (checkpoint, source, 1, 2)]
    assert run_distributed(load_wholes, 2, cases) == [[True] * len(cases)] * 2


def export_random(rank, world_size, archs, folder, tensor, pipeline):
    with parallel_context(tensor=tensor, pipeline=pipeline):
        from megatron_mixcpt.model.build import build_gpt

        for number, arch in enumerate(archs):
            export_model(build_gpt(arch), folder / str(number))


@pytest.mark.distributed
def test_a_checkpoint_of_any_layout_exports_the_same(tmp_path):
    """Random weights are the same on every grid, so one process's export tells what four processes' must be."""
    archs = [dataclasses.replace(TIED, qk_norm=False, model_type="qwen2"), TINY]
    export_random(0, 1, archs, tmp_path / "one", 1, 1)
    run_distributed(export_random, 4, archs, tmp_path / "four", 2, 2)
    for number in range(len(archs)):
        assert_same_bits(tmp_path / f"one/{number}", tmp_path / f"four/{number}")


def test_metadata_is_carried_over(source, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | {"something_of_the_users": 7}
    (folder / "config.json").write_text(json.dumps(config))
    generation = transformers.GenerationConfig(max_new_tokens=3, temperature=0.5, do_sample=True)
    generation.save_pretrained(folder)
    assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt")]) == 0
    assert main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert exported == {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert "Converted from `in`" in (tmp_path / "out/README.md").read_text()
    for name, tensor in read_all(source).items():
        assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], tensor.bfloat16())


def test_added_tokens_get_the_mean_of_the_others(source, tmp_path):
    size = make_tokenizer(tmp_path / "tokenizer", added=["<mix>", "<cpt>", "<x>"])
    arguments = ["--hf", str(source), "--out", str(tmp_path / "ckpt"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["convert", *arguments]) == 0
    assert main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 0
    before, after = read_all(source), read_all(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = len(before[name])
        assert len(after[name]) == size == rows + 3
        assert torch.equal(after[name][:rows], before[name])
        for row in after[name][rows:]:
            torch.testing.assert_close(row, before[name].mean(0))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("abc <mix>", return_tensors="pt")["input_ids"]
    assert tokens.max() == rows
    assert torch.isfinite(model(tokens).logits).all()


def test_tokens_may_be_added_to_a_tokenizer_whose_file_is_in_an_older_form(source, tmp_path):
    """Before 0.20 tokenizers wrote merges as one text; what is saved today has them as pairs."""
    size = make_tokenizer(tmp_path / "tokenizer", added=["<mix>"])
    (tmp_path / "old").mkdir()
    definition = json.loads((source / "tokenizer.json").read_text())
    definition["model"]["merges"] = [" ".join(merge) for merge in definition["model"]["merges"]]
    (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(definition))
    assert extended_vocab_size(tmp_path / "old", tmp_path / "tokenizer", size - 1) == size


def test_equal_sentencepiece_files_hide_no_added_tokens_and_no_other_ids(source, tmp_path):
    size = make_tokenizer(tmp_path / "tokenizer", added=["<mix>"])
    shutil.copytree(source, tmp_path / "own")
    for folder in ("own", "tokenizer"):
        (tmp_path / folder / "tokenizer.model").write_bytes(b"the same pieces")
    assert extended_vocab_size(tmp_path / "own", tmp_path / "tokenizer", size - 1) == size
    path = tmp_path / "tokenizer" / "tokenizer.json"
    definition = json.loads(path.read_text())
    entries = definition["model"]["vocab"]
    entries["a"], entries["b"] = entries["b"], entries["a"]
    path.write_text(json.dumps(definition))
    with pytest.raises(VerificationError, match=r"'[ab]' has another id"):
        extended_vocab_size(tmp_path / "own", tmp_path / "tokenizer", size - 1)
    path.unlink()  # then the pieces are all there is
    assert extended_vocab_size(tmp_path / "own", tmp_path / "tokenizer", size - 1) == size - 1


def test_the_type_of_a_checkpoint_is_that_of_the_weights_that_are_read(source, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    weights = {name: value.bfloat16() for name, value in read_all(source).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(
        {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt")]) == 0
    assert main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 0
    found = read_all(tmp_path / "out")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("how", ["merges", "pieces"])
def test_a_tokenizer_of_another_model_is_refused_with_both_hashes(source, tmp_path, capsys, how):
    if how == "merges":
        make_tokenizer(tmp_path / "tokenizer", merges=("a b", "c d"))
    else:
        make_tokenizer(tmp_path / "tokenizer", merges=())
    arguments = ["--hf", str(source), "--out", str(tmp_path / "ckpt"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["convert", *arguments]) == 3
    error = capsys.readouterr().err
    assert len({word for word in error.replace("(", " ").replace(")", " ").split() if len(word) == 32}) == 2


def test_pickled_weights_are_read_without_running_code(source, tmp_path, capsys):
    folder = tmp_path / "in"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(read_all(source), folder / "pytorch_model.bin")
    assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt")]) == 0
    assert main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 0
    assert_same_bits(source, tmp_path / "out")

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({**read_all(source), "x": Attack()}, folder / "pytorch_model.bin")
    assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt2")]) == 3
    assert "pytorch_model.bin" in capsys.readouterr().err
    assert not (tmp_path / "attacked").exists()


def test_code_in_the_directory_runs_only_when_asked(source, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    damage_config(auto_map={"AutoConfig": "custom.CustomConfig"})(folder)
    (folder / "custom.py").write_text(
        "import pathlib\nfrom transformers import LlamaConfig\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).write_text('')\n"
        "class CustomConfig(LlamaConfig):\n    pass\n"
    )
    assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt")]) == 0
    assert not (tmp_path / "ran").exists()
    assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt2"), "--trust-remote-code"]) == 0
    assert (tmp_path / "ran").exists()
    assert main(["export", str(tmp_path / "ckpt2"), "--out", str(tmp_path / "exported")]) == 0
    assert "auto_map" not in json.loads((tmp_path / "exported" / "config.json").read_text())  # its code is not there
    damage_config(model_type="custom")(folder)
    (tmp_path / "ran").unlink()
    assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt3")]) == 2
    assert "'custom' is not supported" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def damage_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def shards(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        half = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in half.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in half.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        change(folder)

    return damage


ROPE = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# what is wrong -> (how to make it so, exit code, what the message says)
REFUSALS = {
    "no directory": (shutil.rmtree, 2, "not a directory"),
    "no config": (lambda folder: (folder / "config.json").unlink(), 2, "no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), 2, "cannot read"),
    "unknown family": (damage_config(model_type="gpt2"), 2, "'gpt2' is not supported; these are: gemma3_text, llama"),
    "experts in a dense family": (
        damage_config(num_local_experts=8),
        2,
        r"model_type 'llama' with experts \(num_local_experts\) is not supported",
    ),
    "clipped queries": (damage_config(model_type="olmoe", clip_qkv=8.0), 2, "clip_qkv is not supported"),
    "dynamic": (damage_config(rope_parameters=ROPE), 2, "rope type 'dynamic'"),
    "old dynamic": (damage_config(rope_parameters=None, rope_scaling=ROPE), 2, "rope type 'dynamic'"),
    "gelu": (damage_config(hidden_act="gelu"), 2, "hidden_act 'gelu'"),
    "output bias": (damage_config(attention_bias=True), 2, "attention_bias"),
    "quantised": (damage_config(quantization_config={"quant_method": "awq", "bits": 4}), 2, "quantised"),
    "other attention": (
        damage_config(model_type="qwen2", layer_types=["chunked_attention"] * 4),
        2,
        "layers of chunked_attention are not supported",
    ),
    "soft caps": (
        damage_config(model_type="gemma3_text", final_logit_softcapping=30.0, hidden_act=None, rope_parameters=None),
        2,
        "final_logit_softcapping is not supported",
    ),
    "partial rotation": (damage_config(rope_parameters=PARTIAL), 2, "partial_rotary_factor is not supported"),
    "truncated": (truncate, 3, "model.safetensors is truncated or damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), 3, "no weights"),
    "no index": (shards(lambda f: (f / "model.safetensors.index.json").unlink()), 3, "no model.safetensors.index.json"),
    "broken index": (
        shards(lambda f: (f / "model.safetensors.index.json").write_text("[]")),
        3,
        "index.json is damaged",
    ),
    "missing shard": (
        shards(lambda f: (f / "model-00002-of-00002.safetensors").unlink()),
        3,
        "lacks model-00002-of-00002.safetensors",
    ),
    "missing tensor": (edit(lambda t: t.pop("model.norm.weight")), 3, "lacks 1 tensors, first model.norm.weight"),
    "unknown tensor": (edit(lambda t: t.update(extra=torch.ones(1))), 3, "no place for, first extra"),
    "wrong shape": (
        edit(lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        3,
        r"model.norm.weight is \(7,\), its config.json says \(48,\)",
    ),
    "wrong dtype": (
        edit(lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})),
        3,
        "model.norm.weight is I8; weights must be",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_converted_is_said_clearly(source, tmp_path, capsys, case):
    damage, code, message = REFUSALS[case]
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    damage(folder)
    assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt")]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and str(folder) in error
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert not (tmp_path / "ckpt/checkpoint.json").exists()


def test_an_output_with_something_in_it_is_refused(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("keep")
    assert main(["convert", "--hf", str(source), "--out", str(tmp_path / "out")]) == 2
    assert main(["convert", "--hf", str(source), "--out", str(tmp_path / "ckpt")]) == 0
    assert main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_damaged_checkpoint_is_told(source, tmp_path, capsys):
    assert main(["convert", "--hf", str(source), "--out", str(tmp_path / "ckpt")]) == 0
    data = next((tmp_path / "ckpt").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    assert main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 3
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (
        main(["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "out2")]) == 2
    )  # nothing there: a mistake in the command, not damage


MEASURED = r"""
import re, sys
from megatron_mixcpt.cli import main
code = main(sys.argv[1:])
# Not getrusage: its peak survives exec, so it may be the test process's own.
print("peak", 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]))
sys.exit(code)
"""


def peak_bytes(*arguments):
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.split("peak ")[1])


@pytest.mark.slow
def test_memory_follows_the_largest_tensor_not_the_model(tmp_path):
    """1.1 GB of weights, the largest tensor 62 MB: peak <= 3 x 62 MB + 600 MB, both ways."""
    (tmp_path / "in").mkdir()
    largest = write_model(tmp_path / "in", gigabytes=1.1)
    weights = sum(path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors"))
    allowed = 3 * largest + 600 * 2**20
    assert weights > allowed * 1.2, "the model must not fit into what is allowed"
    assert peak_bytes("convert", "--hf", tmp_path / "in", "--out", tmp_path / "ckpt") <= allowed
    assert peak_bytes("export", tmp_path / "ckpt", "--out", tmp_path / "out") <= allowed
    assert_same_bits(tmp_path / "in", tmp_path / "out")
