"""Norm, rotary positions, initialisation, layout and architecture."""

import dataclasses
import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_mixcpt.architecture.architecture import PRESETS, Architecture, RopeScaling
from megatron_mixcpt.architecture.init import initial_tensor
from megatron_mixcpt.architecture.layout import EMBEDDING, OUTPUT, Place, shard, unshard, whole_shapes
from megatron_mixcpt.architecture.stages import Stages
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.model.rope import Rotary, inverse_frequencies
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.model.grid import TIED, TINY, UNLIKE_LLAMA

ROPES = {
    "default": (None, {"rope_type": "default"}),
    "linear": (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        RopeScaling("yarn", 4.0, original_max_position_embeddings=32768),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_frequencies_equal_transformers(kind):
    scaling, parameters = ROPES[kind]
    arch = dataclasses.replace(TINY, head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    parameters = {**parameters, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=parameters)
    if kind == "default":
        expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    torch.testing.assert_close(inverse_frequencies(arch), expected, rtol=1e-6, atol=0)


def test_rotary_angles_survive_a_cast_of_the_model():
    """bf16 cannot tell 1000 from 1001; angles must stay fp32 whatever the model's type."""
    rotary = Rotary(TINY).bfloat16()
    positions = torch.tensor([[0, 1000, 1001]])
    angles = rotary(positions)
    assert angles.shape == (3, 1, 1, TINY.head_dim) and angles.dtype == torch.float32
    assert angles[:, 0, 0, 0].tolist() == [0.0, 1000.0, 1001.0]


def test_unknown_rope_scaling_is_refused():
    with pytest.raises(ValueError, match="dynamic"):
        inverse_frequencies(dataclasses.replace(TINY, rope_scaling=RopeScaling("dynamic", 2.0)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_norm_matches_fp64(dtype, tolerance):
    with parallel_context():
        from megatron_mixcpt.model.norm import RMSNorm
        from megatron_mixcpt.model.specs import transformer_config

        config = transformer_config(
            TINY, Stages((4,), pipeline=1), sequence_parallel=False, params_dtype=dtype, recompute="none"
        )
        norm = RMSNorm(config, 48, eps=1e-5)
    x = (100 * torch.randn(5, 3, 48)).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arch", [TINY, TIED, UNLIKE_LLAMA], ids=["grouped", "tied", "unlike-llama"])
@pytest.mark.parametrize("size", [1, 2])
def test_unshard_inverts_shard(arch, size):
    for name, shape in whole_shapes(arch).items():
        whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        padded = arch.padded_vocab_size(size)
        parts = [shard(name, whole, Place(rank, size), padded) for rank in range(size)]
        assert torch.equal(unshard(name, parts, arch.vocab_size), whole), name
        if name in (EMBEDDING, OUTPUT):
            assert sum(len(part) for part in parts) == padded
            assert not torch.cat(parts)[arch.vocab_size :].any()


def test_random_weights_depend_on_seed_and_name_alone():
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    shape = whole_shapes(TINY)[name]
    first = initial_tensor(name, shape, TINY, seed=1)
    assert torch.equal(first, initial_tensor(name, shape, TINY, seed=1))
    assert not torch.equal(first, initial_tensor(name, shape, TINY, seed=2))
    assert not torch.equal(first, initial_tensor(name.replace("1", "2", 1), shape, TINY, seed=1))
    expected = TINY.initializer_range / math.sqrt(2 * TINY.num_layers)
    assert first.std() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_with_the_stated_number_of_parameters(name):
    arch = dataclasses.replace(PRESETS[name], vocab_size=256, num_layers=2)
    with parallel_context():
        from megatron_mixcpt.attention.documents import Documents
        from megatron_mixcpt.model.build import build_gpt

        model = build_gpt(arch)
        assert sum(p.numel() for p in model.parameters()) == arch.num_parameters  # 256 rows need no padding
        with pytest.raises(RuntimeError, match=r"model\.loss"):
            tokens = torch.zeros(1, 4, dtype=torch.long)
            model(tokens, tokens, Documents.whole(*tokens.shape), labels=tokens)


def test_architecture_round_trips_through_plain_values():
    for arch in (TINY, TIED, UNLIKE_LLAMA, PRESETS["tiny"]):
        assert Architecture.from_dict(arch.to_dict()) == arch


def test_vocabulary_is_padded_to_a_multiple_of_128_a_rank():
    arch = dataclasses.replace(TINY, vocab_size=257)
    assert [arch.padded_vocab_size(t) for t in (1, 2, 3)] == [384, 512, 384]
    assert dataclasses.replace(TINY, vocab_size=256).padded_vocab_size(2) == 256


@pytest.mark.parametrize("tensor, pipeline, fits", [(4, 1, "1, 2, 6"), (5, 1, "1, 2, 6"), (1, 5, "at most 4")])
def test_a_layout_that_does_not_fit_names_those_that_do(tensor, pipeline, fits):
    arch = dataclasses.replace(TINY, ffn_hidden_size=96)
    with pytest.raises(ConfigError, match=fits):
        arch.check_layout(tensor, pipeline)
