"""GGUF files of which transformers reads another model than they hold are refused."""

import re

import gguf
import numpy as np
import pytest

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import architecture_from_hf

HEAD_DIM = 32


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32768)


def unscaled(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    factors("rope_freqs.weight", 1.0)(writer)


def factors(name, value):
    def add(writer):
        writer.add_tensor(name, np.full(HEAD_DIM // 2, value, np.float32))

    return add


def write(path, family, *more):
    """The keys of a small model, without its weights."""
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_context_length(131072)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    for add in more:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("family", "add", "unread"),
    [
        ("llama", factors("rope_freqs.weight", 8.0), "rope_freqs.weight"),
        ("gemma3", linear, "gemma3.rope.scaling.type linear"),
        ("qwen2", yarn, "qwen2.rope.scaling.type yarn"),
        ("phi3", lambda writer: writer.add_rope_dimension_count(24), "phi3.rope.dimension_count 24"),
        ("phi3", factors("rope_factors_long.weight", 9.0), "rope_factors_long.weight"),
        ("qwen3moe", lambda writer: (writer.add_expert_count(4), writer.add_expert_used_count(2)), "experts"),
    ],
)
def test_what_transformers_does_not_read_is_refused(tmp_path, family, add, unread):
    write(tmp_path / "model.gguf", family, add)
    with pytest.raises(ConfigError, match=rf"{re.escape(unread)} of a GGUF file is not read by transformers"):
        architecture_from_hf(tmp_path)


@pytest.mark.parametrize("add", [unscaled, lambda writer: writer.add_rope_dimension_count(HEAD_DIM)])
def test_what_changes_nothing_is_not(tmp_path, add):
    write(tmp_path / "model.gguf", "llama", add)
    assert architecture_from_hf(tmp_path).head_dim == HEAD_DIM
