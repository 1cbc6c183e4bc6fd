"""Where the starting point comes from: a tokenizer that loses nothing, and a clear word if a package is missing."""

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.demo import smallworld
from megatron_mixcpt.demo.base_model import TINY_VOCABULARY, save_smollm2, save_tiny_tokenizer
from megatron_mixcpt.errors import MixcptError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    size = save_tiny_tokenizer(smallworld.make_scenes(600, 1), folder)
    assert 256 < size["vocab_size"] <= TINY_VOCABULARY
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_the_tiny_tokenizer_loses_nothing(tokenizer, text):
    text = text.replace("<|endoftext|>", "").encode("utf-8", "replace").decode()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tiny_tokenizer_has_learned_words_and_an_end(tokenizer):
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
    scene = smallworld.make_scenes(1, 99)[0]
    assert len(tokenizer(scene)["input_ids"]) < 1.5 * len(scene.split())


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(MixcptError, match=r"needs .*gguf.*\n.*pip install gguf accelerate"):
        save_smollm2(tmp_path / "base")
    assert not (tmp_path / "base").exists()
