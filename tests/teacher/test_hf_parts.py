"""Architectures that a teacher may have, in pieces of packed rows, and those that are refused; no DeepSpeed needed."""

import copy
import json
import warnings

import pytest
import torch

from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.config import TeacherConfig
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.demo.base_model import save_tiny_tokenizer
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.teacher.deepspeed import check_hf_teacher
from megatron_mixcpt.teacher.hf_parts import ATTENTION, DocumentsInside
from tests.helpers.corpus import write_mix

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}


def packed_and_alone(kind, **changes):
    """Hidden states of the second of two documents, packed by us and alone by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, num_key_value_heads=4, max_position_embeddings=64, **changes)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    theirs.load_state_dict(ours.state_dict())
    tokens, starts = torch.randint(0, 64, (1, 12)), torch.zeros(1, 12, dtype=torch.bool)
    starts[0, 5] = True
    packing = Documents.of(starts)
    body = DocumentsInside(ours.base_model, ours.config.get_text_config(), kind)
    with torch.no_grad():
        packed = body(packing, input_ids=tokens, position_ids=packing.position_ids(), use_cache=False)
        alone = theirs.base_model(input_ids=tokens[:, 5:])
    return packed.last_hidden_state[:, 5:], alone.last_hidden_state


def test_heads_whose_values_are_narrower_than_their_keys():
    """Multi-head latent attention."""
    experts = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 2,
    }
    packed, alone = packed_and_alone("deepseek_v3", **LATENT, **experts)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)


def test_a_window_that_only_a_mask_would_keep_is_refused_where_it_matters():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match="keeps its sliding_window of 3 in a mask of its own"):
            packed_and_alone("phimoe", num_local_experts=4, sliding_window=3)
        packed, alone = packed_and_alone("phimoe", num_local_experts=4, sliding_window=7)  # no document is longer
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)


LONGROPE = {
    **{"model_type": "phi3", "vocab_size": 256, "pad_token_id": 0, "hidden_size": 32, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "original_max_position_embeddings": 8},
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2", "vocab_size": 256, "n_positions": 8}, "takes 8 tokens, and the rows of"),
        ({"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 8}, "takes 8 tokens, and the rows of"),
        (LONGROPE, "for all of a batch as soon as one is longer than 8 tokens"),
        ({"model_type": "nobody-knows"}, "transformers cannot read its configuration"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "transformers cannot read its configuration"),
        (None, "transformers cannot read its configuration"),
    ],
)
def test_a_configuration_that_does_not_do_is_refused_before_anything_loads(tmp_path, config, message):
    """Code that came with a model is not run, and nobody is asked whether it may."""
    path = write_mix(tmp_path / "data", vocab_size=250)
    save_tiny_tokenizer(["the heron waits"], path.parent / "tokenizer")
    save_tiny_tokenizer(["the heron waits"], tmp_path / "teacher")
    (tmp_path / "teacher" / "config.json").write_text("{" if config is None else json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        check_hf_teacher(TeacherConfig(source="deepspeed", hf=str(tmp_path / "teacher")), read_mix(path))
