"""Adapters leave and come back: PEFT and transformers give our logits, merged or not, with and without a cache."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_mixcpt.adapters.files import read_directory, write_directory
from megatron_mixcpt.hf_alora import load_alora
from megatron_mixcpt.huggingface.config import architecture_from_hf
from tests.model.adapter_models import METHODS, OF_MIXTURES, TOKENS, our_logits, random_tensors
from tests.model.families import OLDER, absent, make

FAMILIES = ["llama-untied", "qwen3-multi-query", "mistral-window"]
WITH_LORA = [
    *((family, method) for family in FAMILIES for method in ("lora", "lora on some")),
    *((family, "lora") for family in ("qwen2", "ministral", "olmo2", "olmo3", "phi3", "phi4-mini", "gemma3")),
    *((family, "lora") for family in ("llama-longrope", "qwen3-windows-yarn")),
    *(("qwen3-experts", method) for method in ("lora", "lora on a dense layer", "lora on some experts")),
    ("mixtral", "lora, Mixtral's names"),
    ("olmoe", "lora"),
]


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
