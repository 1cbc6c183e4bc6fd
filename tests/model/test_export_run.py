"""A trained run becomes a Hugging Face directory with its card; `eval` and `generate` look at it."""

import dataclasses
import json
import math
import os
import re
import shutil

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
import yaml

from megatron_mixcpt.checkpoint.origin import find_origin
from megatron_mixcpt.cli import main
from megatron_mixcpt.commands.generate import NAME as GENERATE
from megatron_mixcpt.config.method import KindWeights
from megatron_mixcpt.convert.card import model_card
from megatron_mixcpt.convert.certificate import FILE_NAME, Certificate, current_versions, features_of, settings_of
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.corpus import edit_mix
from tests.model.families import assert_same_bits, make_tokenizer, make_with_mix, read_all

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, a mixture for its tokenizer, and a run of two steps on one from the other."""
    folder = tmp_path_factory.mktemp("run")
    mix = make_with_mix("qwen2", folder / "base", folder / "data", initializer_range=0.1)
    config = {
        "model": {"hf": str(folder / "base")},
        "data": {"mix": str(mix)},
        "train": {"steps": STEPS, "global_batch_size": 2, "lr": 1e-2, "schedule": "constant", "dtype": "fp32"},
        "run_dir": str(folder / "run"),
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(folder / "train.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    assert main(["export", str(folder / "run"), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_export_holds_the_trained_weights(folder, exported):
    from megatron_mixcpt.architecture.layout import unshard
    from megatron_mixcpt.huggingface.names import hf_names, split

    with parallel_context():
        from megatron_mixcpt.checkpoint.start import load_model_weights
        from megatron_mixcpt.huggingface.config import architecture_from_hf
        from megatron_mixcpt.model.build import build_gpt

        arch = architecture_from_hf(exported)
        model = build_gpt(arch, seed=None)
        load_model_weights(model, folder / "run")
        tensors = read_all(exported)
        base = read_all(folder / "base")
        for slot in model.slots():
            whole = unshard(slot.name, [slot.parameter.detach()], arch.vocab_size)
            for name, part in zip(hf_names(slot.name, arch), split(slot.name, whole, arch)):
                assert torch.equal(tensors[name], part), name
                assert not torch.equal(base[name], part), f"{name} was not trained"
    config = json.loads((folder / "base/config.json").read_text())
    assert json.loads((exported / "config.json").read_text()) == {
        **config,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    transformers.AutoTokenizer.from_pretrained(exported)


def test_the_card_tells_data_training_gain_and_loss(folder, exported):
    card = (exported / "README.md").read_text()
    mix = json.loads((folder / "data/mix.json").read_text())
    assert mix["fingerprint"] in card and str(folder / "base") in card and "target `swap`" in card
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if any(key.startswith("val/") for key in row)]
    for source in mix["sources"]:
        before, after = (row[f"val/{source['name']}/ppl"] for row in (validations[0], validations[-1]))
        change = f"{after / before - 1:+.1%}"
        assert f"| {source['name']} | {source['kind']} | {before:.3f} | {after:.3f} | {change} |" in card
    assert "Not measured" not in card


def test_the_card_names_what_was_not_measured_and_has_no_empty_table(folder):
    origin = find_origin(folder / "run")
    assert f"A qwen2 of {origin.arch.num_parameters / 1e6:.2g}M parameters" in model_card(origin)
    first, second = origin.mix.sources
    rare = dataclasses.replace(second, name="rare", valid=None)
    one = dataclasses.replace(origin.mix, sources=(first, rare))
    unmeasured = tuple(dataclasses.replace(source, valid=None) for source in origin.mix.sources)
    none = dataclasses.replace(origin.mix, sources=unmeasured)
    card = model_card(dataclasses.replace(origin, mix=one))
    assert (
        f"| {first.name} | domain |" in card and "Not measured: rare (no validation split with target tokens)." in card
    )
    card = model_card(dataclasses.replace(origin, mix=none, run_dir=folder / "base"))  # without metrics
    assert f"Not measured: {first.name}, {second.name} (" in card and "| before |" not in card
    assert "Gain and loss" not in model_card(dataclasses.replace(origin, run_dir=folder / "base"))


def test_the_card_shows_a_certificate_of_this_run_and_no_other(folder):
    origin = find_origin(folder / "run")
    grid = {"tensor": 1, "pipeline": 1, "context": 1, "data": 1}
    own = Certificate(
        settings_of(origin.config), features_of(origin.arch), 1, grid, current_versions(), "cpu", [], 144, ["saving"]
    )
    try:
        own.write(folder / "run")
        card = model_card(origin)
        assert "## Certified" in card and "144 comparisons" in card and "Not part of it: saving." in card
        for other in ({"ranks": 8}, {"versions": {**current_versions(), "torch": "0.1"}}):
            dataclasses.replace(own, **other).write(folder / "run")
            assert "## Certified" not in model_card(origin)
    finally:
        (folder / "run" / FILE_NAME).unlink()


def test_what_is_shipped_is_the_newest_checkpoint_or_what_was_allowed(folder, tmp_path, capsys):
    """export, generate and eval refuse a damaged newest checkpoint by name; `--allow-older` takes the one before, and
    the card says so."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    older = run / "checkpoints" / f"step_{STEPS:08d}"
    newest = older.with_name(f"step_{STEPS + 7:08d}")
    shutil.copytree(older, newest)
    os.truncate(newest / "__0_0.distcp", 100)
    for command in (
        ["export", str(run), "--out", str(tmp_path / "out")],
        ["generate", str(run), "--prompt", "a"],
        ["eval", str(run), "--mix", str(folder / "data/mix.json"), "--out", str(tmp_path / "eval")],
    ):
        assert main(command) == 3
        said = capsys.readouterr().err
        assert f"{newest}/__0_0.distcp: 100 bytes" in said and "--allow-older" in said and str(older) in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "eval").exists()
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--allow-older"]) == 0
    assert f"falling back to {older.name}" in capsys.readouterr().err
    assert f"from step {STEPS}." in (tmp_path / "out/README.md").read_text()
    assert main(["generate", str(run), "--prompt", "a", "--max-new-tokens", "1", "--allow-older"]) == 0


def test_a_run_whose_base_is_gone_says_so(folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["hf"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err


def with_tokenizer(folder, out, **tokenizer):
    """A configuration whose mixture was made with another tokenizer than the base model's."""
    shutil.copytree(folder / "data", out / "data")
    shutil.rmtree(out / "data/tokenizer")
    size = make_tokenizer(out / "data/tokenizer", **tokenizer)
    edit_mix(out / "data/mix.json", lambda mix: mix["tokenizer"].update(vocab_size=size))
    config = yaml.safe_load((folder / "train.yaml").read_text())
    config |= {"data": {"mix": str(out / "data/mix.json")}, "run_dir": str(out / "run")}
    (out / "train.yaml").write_text(yaml.safe_dump(config))
    return out / "train.yaml"


def test_tokens_added_by_the_data_become_rows_of_the_model(folder, tmp_path):
    config = with_tokenizer(folder, tmp_path, added=["<gene>", "<drug>"])
    assert main(["train", str(config)]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    before, after = (read_all(path)["model.embed_tokens.weight"] for path in (folder / "base", tmp_path / "out"))
    assert len(after) == len(before) + 2
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("<drug>", return_tensors="pt")["input_ids"]
    assert tokens.tolist() == [[len(after) - 1]]


def test_an_export_has_the_template_that_its_data_was_made_with_and_stops_where_that_ends_an_answer(
    folder, tmp_path, capsys
):
    """The base model has another template, in the newer of the two places, and knows no end of a turn."""
    end = tokenizers.AddedToken("<|im_end|>", special=True)
    config = with_tokenizer(folder, tmp_path, added=[end])
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer = tmp_path / "data/tokenizer"
    (tokenizer / "chat_template.jinja").unlink()
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert (folder / "base/chat_template.jinja").is_file()
    assert main(["train", str(config)]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "<|im_end|>" in capsys.readouterr().err
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.chat_template == template
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    before = transformers.GenerationConfig.from_pretrained(folder / "base").eos_token_id
    assert ends == [before, exported.convert_tokens_to_ids("<|im_end|>")]


def test_data_of_another_tokenizer_is_refused_with_both_hashes(folder, tmp_path, capsys):
    config = with_tokenizer(folder, tmp_path, merges=("a b", "c d"))
    assert main(["train", str(config)]) == 3
    error = capsys.readouterr().err
    assert "has another id" in error and len(re.findall(r"\b[0-9a-f]{32}\b", error)) == 2


def test_a_run_that_starts_from_a_converted_checkpoint_is_the_same_run(folder, exported, tmp_path):
    assert main(["convert", "--hf", str(folder / "base"), "--out", str(tmp_path / "ckpt")]) == 0
    config = yaml.safe_load((folder / "train.yaml").read_text())
    config |= {"model": {"checkpoint": str(tmp_path / "ckpt")}, "run_dir": str(tmp_path / "run")}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "train.yaml")]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert_same_bits(exported, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (exported / "config.json").read_bytes()
    assert str(tmp_path / "ckpt") in (tmp_path / "out/README.md").read_text()


def test_a_checkpoint_without_rows_for_added_tokens_is_refused(folder, tmp_path, capsys):
    assert main(["convert", "--hf", str(folder / "base"), "--out", str(tmp_path / "ckpt")]) == 0
    path = with_tokenizer(folder, tmp_path, added=["<gene>"])
    config = yaml.safe_load(path.read_text()) | {"model": {"checkpoint": str(tmp_path / "ckpt")}}
    path.write_text(yaml.safe_dump(config))
    assert main(["train", str(path)]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_eval_repeats_the_runs_own_validation_and_agrees_with_the_export(folder, exported, tmp_path):
    assert main(["eval", str(folder / "run"), "--out", str(tmp_path / "run")]) == 0
    arguments = ["--mix", str(folder / "data/mix.json"), "--base", str(folder / "base"), "--out", str(tmp_path / "hf")]
    assert main(["eval", str(exported), *arguments]) == 0
    from_run, from_hf = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("run", "hf"))
    assert from_run["base"]["path"] == str(folder / "base")
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if any(key.startswith("val/") for key in row)]
    for side, row in (("base", validations[0]), ("model", validations[-1])):
        assert from_run[side]["sources"] == from_hf[side]["sources"]
        for source in from_run[side]["sources"]:
            assert source["value"] == pytest.approx(row[f"val/{source['name']}/ppl"], rel=1e-6)
    losses = {
        (side, source["kind"]): math.log(source["value"])
        for side in ("base", "model")
        for source in from_run[side]["sources"]
    }
    gain = losses["base", "domain"] - losses["model", "domain"]
    forgetting = losses["model", "instruction"] - losses["base", "instruction"]
    assert from_run["change"]["domain_gain"] == pytest.approx(gain)
    assert from_run["change"]["general_forgetting"] == pytest.approx(forgetting)
    report = (tmp_path / "run/eval.md").read_text()
    assert f"nats a token | {gain:+.4f} |" in report and f"nats a token | {forgetting:+.4f} |" in report


def test_generate_says_what_transformers_says(folder, exported, capsys):
    capsys.readouterr()
    for model in (folder / "run", exported):
        assert main([GENERATE, str(model), "--prompt", "abc", "--prompt", "hello", "--max-new-tokens", "5"]) == 0
    from_run, from_hf = (text for text in _halves(capsys.readouterr().out))
    assert from_run == from_hf
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer("abc", return_tensors="pt")["input_ids"]
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)[0]
    assert from_hf.startswith(tokenizer.decode(expected, skip_special_tokens=True))


def _halves(output):
    lines = [line for line in output.splitlines() if not line.startswith("export")]
    assert len(lines) % 2 == 0
    return "\n".join(lines[: len(lines) // 2]), "\n".join(lines[len(lines) // 2 :])


def test_sampling_follows_the_seed_and_chat_needs_a_template(folder, exported, tmp_path, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        options = ["--temperature", "5", "--max-new-tokens", "20", "--seed", seed, "--chat"]
        assert main([GENERATE, str(exported), "--prompt", "abc", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    plain = tmp_path / "plain"
    shutil.copytree(exported, plain, ignore=shutil.ignore_patterns("chat_template*"))
    assert main([GENERATE, str(plain), "--prompt", "abc", "--chat"]) == 2
    assert "chat template" in capsys.readouterr().err


def test_a_chain_that_is_started_again_finds_its_export_done(folder, exported, tmp_path, capsys):
    before = (exported / "config.json").stat().st_mtime_ns
    assert main(["export", str(folder / "run"), "--out", str(exported)]) == 0
    assert "is there already" in capsys.readouterr().out
    assert (exported / "config.json").stat().st_mtime_ns == before
    assert main(["export", str(folder / "run"), "--out", str(exported), "--dtype", "bf16"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_card_tells_the_shares_and_the_objective_of_the_run(folder):
    origin = find_origin(folder / "run")
    names = [source.name for source in origin.mix.train_sources]
    weights = {name: float(number) for number, name in enumerate(names, start=1)}
    data = origin.config.data.model_copy(update={"weights": weights})
    loss = origin.config.loss.model_copy(update={"by_kind": {"preference": KindWeights(ce=0.0, kd=2.0)}})
    card = model_card(dataclasses.replace(origin, config=origin.config.model_copy(update={"data": data, "loss": loss})))
    for source in origin.mix.train_sources:
        share = weights[source.name] / sum(weights.values())
        assert f"| {source.name} | {source.kind} | {share:.1%} |" in card
    assert "; preference: cross-entropy x 0, KL x 2" in card


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval", "{base}", "--out", "{tmp}"], "nothing to measure"),
        (["eval", "{base}", "--out", "{tmp}", "--tasks", "{tmp}/no.yaml"], "cannot be read"),
        (["eval", "{tmp}/none", "--out", "{tmp}", "--mix", "{mix}"], "no such directory"),
        (["generate", "{tmp}/none", "--prompt", "x"], "no such directory"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, capsys, arguments, message):
    if "--tasks" in arguments:
        pytest.importorskip("lm_eval")
    places = {"base": folder / "base", "tmp": tmp_path, "mix": folder / "data/mix.json"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_data_that_was_prepared_again_with_another_tokenizer_is_no_source_of_one(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    data = shutil.copytree(folder / "data", tmp_path / "data")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["mix"] = str(data / "mix.json")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    edit_mix(data / "mix.json", lambda content: content["tokenizer"].update(hash="another"))
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "was trained with another tokenizer than" in said and str(data / "mix.json") in said
    shutil.rmtree(data)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert f"warning: {data / 'mix.json'} is gone" in capsys.readouterr().err


def test_what_a_run_started_from_is_not_compared_with_once_it_holds_other_weights(folder, tmp_path, capsys):
    """Of a stage that starts from another run, which went on since then, or a directory that was written anew."""
    base = shutil.copytree(folder / "base", tmp_path / "base")
    run = shutil.copytree(folder / "run", tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["hf"] = str(base)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["average", "--tuned", str(run), "--alpha", "0.5", "--no-eval", "--out"]
    assert main([*words, str(tmp_path / "before")]) == 0
    for path in base.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    capsys.readouterr()
    assert main([*words, str(tmp_path / "after")]) == 3
    assert f"was trained from other weights than {base} holds now" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "after"), "--base", str(folder / "base")]) == 0
