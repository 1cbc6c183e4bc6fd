"""Models as wide as the published ones, with few layers and a cut vocabulary: every bit, and transformers' logits."""

import gc

import pytest
import torch
import transformers

from tests.helpers.spawn import run_distributed
from tests.model.conversion import our_logits, round_trip, tokens_of
from tests.model.families import assert_same_bits
from tests.slurm.published import CONFIGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FACTORS = [1.0 + n / 16 for n in range(48)]  # of longrope; the published ones rise likewise
SHAPES = {
    "gemma-3-4b": (2, CONFIGS["gemma-3-4b-text"] | {"layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3-30b-a3b": (1, CONFIGS["Qwen3-30B-A3B"]),
    "phi-4-mini": (
        2,
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "sliding_window": 262144,
            "partial_rotary_factor": 0.75,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]},
            "tie_word_embeddings": True,
        },
    ),
    "olmo-2-1b": (
        2,
        {
            "model_type": "olmo2",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 4096,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-6,
        },
    ),
}
"""name -> (layers that are kept, what config.json says)"""
VOCABULARY = 1001


def make_wide(name, out):
    """Save the model in bf16 and return it in fp32, evaluating, with eager attention."""
    layers, values = SHAPES[name]
    values = {key: value for key, value in values.items() if key not in ("architectures", "sliding_window_pattern")}
    values |= {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    # Drawn once, for to draw every weight takes longer than all else; the length is a prime, so that experts differ.
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.no_grad():
        for number, (parameter_name, parameter) in enumerate(model.named_parameters()):
            size, own = parameter.numel(), noise.roll(77_777 * number)
            drawn = own.repeat(size // len(own) + 1)[:size].view(parameter.shape)
            parameter.copy_(1 + 0.3 * drawn if "norm" in parameter_name else 0.02 * drawn)
    model.save_pretrained(out)
    del model  # gigabytes, as all that is deleted here
    # Read again: what is no weight, as Gemma's scale of embeddings, would keep its rounding to bf16.
    return transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32)


def round_trip_over_ranks(rank, world_size, source, out, tensor, expert):
    round_trip(source, out, tensor, 1, torch.bfloat16, expert)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SHAPES)
def test_published_widths_keep_every_bit_and_every_logit(name, tmp_path):
    reference = make_wide(name, tmp_path / "in")
    tokens = tokens_of(reference)
    with torch.no_grad():
        expected = reference(tokens).logits
    del reference
    gc.collect()
    actual = our_logits(tmp_path / "in", tokens, torch.zeros(tokens.shape, dtype=torch.bool))
    assert expected.abs().max() > 0.5
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    gc.collect()
    layout = (1, 2) if "num_experts" in SHAPES[name][1] else (2, 1)
    run_distributed(round_trip_over_ranks, 2, tmp_path / "in", tmp_path / "out", *layout, timeout=900)
    assert_same_bits(tmp_path / "in", tmp_path / "out")
