"""A very small Llama with a byte-level tokenizer, saved as a user would find it."""

import pytest
import torch

from megatron_mixcpt.demo.base_model import save_tiny_tokenizer


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf")
    save_tiny_tokenizer(["The heron stands in the shallow water and waits. " * 3], folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,  # logits far from uniform: differences must show
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_and_tokenizer(hf_dir):
    from megatron_mixcpt.evaluate.loading import load_directory

    return load_directory(hf_dir)
