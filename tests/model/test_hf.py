"""Hugging Face -> megatron on any grid -> Hugging Face: every bit, every logit."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.exporting import export_model
from tests.helpers.spawn import run_distributed
from tests.model.conversion import our_logits, round_trip, tokens_of
from tests.model.families import BASE, FAMILIES, OLDER, WINDOWS, absent, assert_same_bits, make, read_all

GRIDS = {"tp2": (2, 1), "pp2": (1, 2), "tp2pp2": (2, 2)}
EXPERTS = ("qwen3-experts", "mixtral", "olmoe")


def round_trips(rank, world_size, jobs):
    for job in jobs:
        round_trip(*job)


class Made(dict):
    """Models by family."""

    def __missing__(self, name):
        pytest.skip(absent(name))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    return Made({name: (folder / name, make(name, folder / name)) for name in FAMILIES if not absent(name)})


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """{(family, grid): directory} after a round trip on several processes."""
    out = tmp_path_factory.mktemp("out")
    result = {}
    for world_size in (2, 4):
        jobs = []
        for grid, (tensor, pipeline) in GRIDS.items():
            if tensor * pipeline == world_size:
                for name, (source, _) in models.items():
                    result[name, grid] = out / grid / name
                    jobs.append((source, result[name, grid], tensor, pipeline, torch.float32))
        for name in EXPERTS if world_size == 4 else ():
            if name in models:
                for grid, layout in (("tp2ep2", (2, 1)), ("pp2ep2", (1, 2))):
                    result[name, grid] = out / grid / name
                    jobs.append((models[name][0], result[name, grid], *layout, torch.float32, 2))
        run_distributed(round_trips, world_size, jobs, timeout=400)
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_one_process_round_trip_keeps_every_bit(models, name, tmp_path):
    source, _ = models[name]
    round_trip(source, tmp_path / "out", 1, 1, torch.float32)
    assert_same_bits(source, tmp_path / "out")


@pytest.mark.parametrize(
    "name, heads, groups, head_dim", [("qwen2", 5, 1, 6), ("qwen3", 9, 3, 10), ("mistral", 7, 7, 4)]
)
def test_odd_heads_keep_every_bit_and_every_logit(name, heads, groups, head_dim, tmp_path):
    family = {"qwen3": "qwen3-multi-query", "mistral": "mistral-window"}.get(name, name)
    changes = {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 131}
    if name == "qwen2":  # which has no head_dim of its own
        changes["hidden_size"] = heads * head_dim
    else:
        changes["head_dim"] = head_dim
    check_bits_and_logits(make(family, tmp_path / "in", **changes), tmp_path)


@pytest.mark.parametrize("step, without, mixed", [(2, [3], {1}), (2, [], {1, 3}), (3, [0], {2})])
def test_dense_layers_between_experts_are_those_that_config_json_names(step, without, mixed, tmp_path):
    changes = {"decoder_sparse_step": step, "mlp_only_layers": without}
    check_bits_and_logits(make("qwen3-experts", tmp_path / "in", **changes), tmp_path)
    routers = {name for name in read_all(tmp_path / "out") if name.endswith("mlp.gate.weight")}
    assert routers == {f"model.layers.{layer}.mlp.gate.weight" for layer in mixed}


@pytest.mark.parametrize("name", ["llama-untied", "olmo2"])
def test_a_window_that_the_family_does_not_have_is_none(name, tmp_path):
    """As in transformers, whatever config.json says."""
    check_bits_and_logits(make(name, tmp_path / "in", sliding_window=3, layer_types=WINDOWS), tmp_path)


def check_bits_and_logits(reference, folder):
    round_trip(folder / "in", folder / "out", 1, 1, torch.float32)
    assert_same_bits(folder / "in", folder / "out")
    tokens = tokens_of(reference)
    with torch.no_grad():
        expected = reference(tokens).logits
    actual = our_logits(folder / "in", tokens, torch.zeros(tokens.shape, dtype=torch.bool))
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.distributed
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_grid_keeps_every_bit(models, exported, name, grid):
    assert_same_bits(models[name][0], exported[name, grid])


@pytest.mark.distributed
@pytest.mark.parametrize("grid", ["tp2ep2", "pp2ep2"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_over_ranks_keep_every_bit(models, exported, name, grid):
    assert_same_bits(models[name][0], exported[name, grid])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "via-fp32"])
def test_sixteen_bit_weights_survive(tmp_path, dtype):
    make("qwen2", tmp_path / "in", dtype=torch.bfloat16, shard_size="50KB")
    assert (tmp_path / "in/model.safetensors.index.json").exists()
    with parallel_context():
        from megatron_mixcpt.huggingface.config import architecture_from_hf
        from megatron_mixcpt.model.build import build_gpt
        from megatron_mixcpt.model.load import load_hf

        model = build_gpt(architecture_from_hf(tmp_path / "in"), params_dtype=dtype, seed=None)
        load_hf(model, tmp_path / "in")
        export_model(model, tmp_path / "out", tmp_path / "in", "bf16")
    assert_same_bits(tmp_path / "in", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(models, name):
    source, reference = models[name]
    tokens = tokens_of(reference)
    with torch.no_grad():
        expected = reference(tokens).logits
    whole = torch.zeros(tokens.shape, dtype=torch.bool)
    actual = our_logits(source, tokens, whole)
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_separate_ones(models, name):
    source, reference = models[name]
    tokens = tokens_of(reference)
    doc_start = torch.zeros(tokens.shape, dtype=torch.bool)
    cuts = {0: [0, 9, 10, 20], 1: [0, 3, 20]}
    for row, edges in cuts.items():
        doc_start[row, edges[:-1]] = True
    actual = our_logits(source, tokens, doc_start)
    for row, edges in cuts.items():
        for start, end in itertools.pairwise(edges):
            with torch.no_grad():
                expected = reference(tokens[row : row + 1, start:end]).logits[0]
            error = (actual[row, start:end] - expected).abs().max()
            assert error <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_export_loads_in_transformers_without_complaint(models, name, tmp_path):
    source, reference = models[name]
    round_trip(source, tmp_path / "out", 1, 1, torch.float32)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    tokens = tokens_of(reference)
    with torch.no_grad():
        # Not bit by bit: where weights lie in memory decides how transformers 4 rounds the experts' products.
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_from_no_directory_exports(models, name, tmp_path):
    """A preset has no config.json to carry over; the one written must describe the same architecture."""
    check_export_from_no_directory(*models[name], tmp_path)


def test_longrope_of_phi_is_written_as_both_generations_of_transformers_read_it(tmp_path):
    """4 refuses any entry beyond three, 5 prefers these to `rope_parameters`."""
    rope = dict(FAMILIES["phi4-mini"][1]["rope_parameters"])
    del rope["attention_factor"]
    reference = make("phi4-mini", tmp_path / "in", **({} if OLDER else {"rope_parameters": rope}))
    check_export_from_no_directory(tmp_path / "in", reference, tmp_path)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_scaling"] == {
        "type": "longrope",
        "short_factor": rope["short_factor"],
        "long_factor": rope["long_factor"],
    }


def check_export_from_no_directory(source, reference, tmp_path):
    with parallel_context():
        from megatron_mixcpt.huggingface.config import architecture_from_hf
        from megatron_mixcpt.model.build import build_gpt
        from megatron_mixcpt.model.load import load_hf

        arch = architecture_from_hf(source)
        model = build_gpt(arch, seed=None)
        load_hf(model, source)
        export_model(model, tmp_path / "out")
        assert architecture_from_hf(tmp_path / "out") == arch
    tokens = tokens_of(reference)
    with torch.no_grad():
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")(tokens)
        torch.testing.assert_close(ours.logits, reference(tokens).logits, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_that_of_transformers(models, name):
    """Greedily, with its key-value cache. Keys of longrope stay there as they were, so these rows stay short."""
    source, reference = models[name]
    tokens = tokens_of(reference, rows=1, length=4)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    expected = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    for _ in range(5):
        logits = our_logits(source, tokens, torch.zeros(tokens.shape, dtype=torch.bool))[:, -1]
        logits[:, reference.config.eos_token_id] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, expected)


def test_the_text_part_of_gemma_3_is_taken_out_as_the_page_says(tmp_path, monkeypatch):
    """From a model with a vision part, whose own logits of text are those of what is taken out."""
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    text = {key: value for key, value in BASE.items() if key != "pad_token_id"} | {"head_dim": 8, "sliding_window": 5}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    torch.manual_seed(0)
    reference = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    monkeypatch.chdir(tmp_path)
    reference.save_pretrained("models/gemma-3-4b")
    exec(code, {"transformers": transformers})
    tokens = tokens_of(reference.model.language_model)
    with torch.no_grad():
        expected = reference(tokens).logits
    actual = our_logits(Path("models/gemma-3-4b-text"), tokens, torch.zeros(tokens.shape, dtype=torch.bool))
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
