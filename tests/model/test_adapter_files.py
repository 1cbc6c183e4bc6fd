"""Adapters leave and come back: PEFT and transformers give our logits, merged or not, with and without a cache."""

import json
import shutil

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from megatron_mixcpt.adapters.files import read_directory, write_directory
from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.cli import main
from megatron_mixcpt.hf_alora import load_alora
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.corpus import write_mix
from tests.model.adapter_models import METHODS, OF_MIXTURES, fill, random_tensors
from tests.model.families import OLDER, absent, make, make_tokenizer, read_all

TOKENS = torch.randint(3, 301, (2, 13), generator=torch.Generator().manual_seed(5))
FAMILIES = ["llama-untied", "qwen3-multi-query", "mistral-window"]
WITH_LORA = [
    *((family, method) for family in FAMILIES for method in ("lora", "lora on some")),
    *((family, "lora") for family in ("qwen2", "ministral", "olmo2", "olmo3", "phi3", "phi4-mini", "gemma3")),
    *((family, "lora") for family in ("llama-longrope", "qwen3-windows-yarn")),
    *(("qwen3-experts", method) for method in ("lora", "lora on a dense layer", "lora on some experts")),
    ("mixtral", "lora, Mixtral's names"),
    ("olmoe", "lora"),
]


def our_logits(hf_dir, adapter, tensors, tokens=TOKENS):
    with parallel_context():
        from megatron_mixcpt.attention.documents import Documents
        from megatron_mixcpt.model.build import build_gpt
        from megatron_mixcpt.model.load import load_hf

        model = build_gpt(architecture_from_hf(hf_dir), seed=None, adapter=adapter)
        load_hf(model, hf_dir)
        fill(model, tensors)
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
        with torch.no_grad():
            return model(tokens, positions, Documents.whole(*tokens.shape))[..., : model.arch.vocab_size]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name in dict(WITH_LORA):
        if not absent(name):
            make(name, folder / name, initializer_range=0.1)
    return folder


def written(folder, base, method, scale=0.05):
    """(its directory, its whole tensors) of an adapter with random values."""
    arch = architecture_from_hf(base)
    adapter = (METHODS | OF_MIXTURES)[method]
    tensors = random_tensors(arch, adapter, scale=scale)
    folder.mkdir()
    write_directory(folder, arch, adapter, tensors, str(base))
    return folder, tensors


@pytest.mark.parametrize("family, method", WITH_LORA)
def test_peft_gives_our_logits(bases, tmp_path, family, method):
    if absent(family):
        pytest.skip(absent(family))
    folder, tensors = written(tmp_path / "adapter", bases / family, method)
    base = transformers.AutoModelForCausalLM.from_pretrained(bases / family)
    before = base(TOKENS).logits
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    found = model(TOKENS).logits
    adapter = (METHODS | OF_MIXTURES)[method]
    expected = our_logits(bases / family, adapter, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    back = read_directory(folder, architecture_from_hf(bases / family), adapter)
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert (found - before).abs().max() > 100 * 1e-5 * expected.abs().max()


def test_what_peft_wrote_comes_in_and_goes_out_bit_for_bit(bases, tmp_path):
    base = bases / "qwen3-multi-query"
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.eval().save_pretrained(tmp_path / "peft")
    adapter = METHODS["lora"].model_copy(update={"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]})
    arch = architecture_from_hf(base)
    tensors = read_directory(tmp_path / "peft", arch, adapter)
    expected = model(TOKENS).logits
    found = our_logits(base, adapter, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    (tmp_path / "ours").mkdir()
    write_directory(tmp_path / "ours", arch, adapter, tensors, str(base))
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.skipif(OLDER, reason="transformers had a layer for each expert before 5")
def test_what_peft_trained_of_all_experts_together_comes_in(bases, tmp_path):
    base = bases / "qwen3-experts"
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    model.eval().save_pretrained(tmp_path / "peft")
    adapter = METHODS["lora"].model_copy(
        update={"rank": 4, "alpha": 6.0, "targets": ["q_proj", "model.layers.*.mlp.experts.*"]}
    )
    arch = architecture_from_hf(base)
    expected = model(TOKENS).logits
    found = our_logits(base, adapter, read_directory(tmp_path / "peft", arch, adapter))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(Exception, match=r"experts.* is \(24, 48\), this model takes \(36, 48\)"):
        other = adapter.model_copy(update={"rank": 6})
        settings = tmp_path / "peft/adapter_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"r": 6}))
        read_directory(tmp_path / "peft", arch, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["alora", "alora without residual", "alora on some"])
def test_transformers_gives_our_logits_of_alora_at_once_and_token_by_token(bases, tmp_path, family, method):
    folder, tensors = written(tmp_path / "adapter", bases / family, method)
    model = load_alora(folder)
    expected = our_logits(bases / family, METHODS[method], tensors)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * expected.abs().max().item()}
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, **tolerance)
        torch.testing.assert_close(model(TOKENS, use_cache=False).logits, expected, **tolerance)
        cache, pieces = None, []
        for begin, end in ((0, 4), (4, 5), (5, 9), (9, 13)):  # several tokens at once too
            output = model(TOKENS[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_generation_without(bases, tmp_path, family):
    folder, _ = written(tmp_path / "adapter", bases / family, "alora", scale=0.3)
    model = load_alora(folder)
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            model.generate(TOKENS, use_cache=True, **options), model.generate(TOKENS, use_cache=False, **options)
        )


def test_padding_on_the_left_changes_nothing(bases, tmp_path):
    folder, _ = written(tmp_path / "adapter", bases / "llama-untied", "alora", scale=0.3)
    model = load_alora(folder)
    row = TOKENS[:1, :6]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], dim=1)
    both = torch.cat([padded, TOKENS[1:, :10]])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(both, attention_mask=mask, **options)
    assert torch.equal(together[0, 4:], model.generate(row, attention_mask=torch.ones_like(row), **options)[0])
    assert torch.equal(together[1], model.generate(TOKENS[1:, :10], **options)[0])


def test_packed_documents_are_kept_apart_by_a_mask_of_four_dimensions(bases, tmp_path):
    folder, _ = written(tmp_path / "adapter", bases / "llama-untied", "alora", scale=0.3)
    model = load_alora(folder)
    positions = torch.cat([torch.arange(5), torch.arange(8)])
    document = (positions == 0).cumsum(0)
    mask = (document[:, None] == document) & torch.ones(13, 13).tril().bool()
    with torch.no_grad():
        whole = model(TOKENS[:1], attention_mask=mask[None, None], position_ids=positions[None]).logits[0]
        alone = model(TOKENS[:1, 5:]).logits[0]
    torch.testing.assert_close(whole[5:], alone, rtol=1e-4, atol=1e-4)


def test_a_base_of_another_shape_and_a_fixed_cache_are_refused(bases, tmp_path):
    folder, _ = written(tmp_path / "adapter", bases / "llama-untied", "alora")
    with pytest.raises(ValueError, match="another base model"):
        load_alora(folder, base=bases / "mistral-window")
    with pytest.raises(ValueError, match="DynamicCache"):
        load_alora(folder).generate(TOKENS, cache_implementation="static", max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 5}, "set adapter.rank=5"),
        ({"lora_alpha": 7}, "set adapter.alpha=7"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": {"embed_tokens": [0]}}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "not LORA"),
    ],
)
def test_adapters_that_are_not_ours_are_refused(bases, tmp_path, change, message):
    folder, _ = written(tmp_path / "adapter", bases / "llama-untied", "lora")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Exception, match=message):
        read_directory(folder, architecture_from_hf(bases / "llama-untied"), METHODS["lora"])


def test_an_adapter_on_other_layers_or_without_some_is_refused(bases, tmp_path):
    arch = architecture_from_hf(bases / "llama-untied")
    folder, _ = written(tmp_path / "adapter", bases / "llama-untied", "lora")
    fewer = METHODS["lora"].model_copy(update={"targets": ["q_proj"]})
    with pytest.raises(Exception, match="adapts other layers than"):
        read_directory(folder, arch, fewer)
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "layers.2" not in key}, path)
    with pytest.raises(Exception, match="is not adapted there"):
        read_directory(folder, arch, METHODS["lora"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Exception, match="cannot be read"):
        read_directory(folder, arch, METHODS["lora"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base model, a mixture, and runs of two steps: `lora`, `alora`, and `more`, which goes on from `lora`."""
    folder = tmp_path_factory.mktemp("runs")
    size = make_tokenizer(folder / "base")
    make("qwen2", folder / "base", vocab_size=size, initializer_range=0.1)
    mix = write_mix(folder / "data", vocab_size=size)
    shutil.copytree(folder / "base", folder / "data/tokenizer", ignore=shutil.ignore_patterns("model*", "*config.json"))
    shutil.copy(folder / "base/tokenizer_config.json", folder / "data/tokenizer")
    for name, start in (("lora", None), ("alora", None), ("more", "lora"), ("full", "lora"), ("imported", None)):
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
        if name == "full":
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
    assert validations(runs / "more")[0] == pytest.approx(validations(runs / "lora")[-1])
    assert validations(runs / "imported")[-1] != validations(runs / "lora")[-1]


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
        assert "trained beside other weights" in capsys.readouterr().err


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
