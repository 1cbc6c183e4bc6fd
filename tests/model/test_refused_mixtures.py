"""Mixtures of experts that are not supported: by their config.json alone, each is refused by name."""

import json

import pytest

from megatron_mixcpt.cli import main
from megatron_mixcpt.huggingface.families import FAMILIES

# What the published configurations say of their experts.
PUBLISHED = {
    "Qwen2-MoE": {
        "model_type": "qwen2_moe",
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
    },
    "DeepSeek-V2": {
        "model_type": "deepseek_v2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "kv_lora_rank": 512,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "GLM-4-MoE": {"model_type": "glm4_moe", "n_routed_experts": 128, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "Llama 4": {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_local_experts": 16}},
    "Llama 4, text": {"model_type": "llama4_text", "num_local_experts": 16, "interleave_moe_layer_step": 1},
    "GPT-OSS": {
        "model_type": "gpt_oss",
        "num_local_experts": 32,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "of a family younger than transformers": {"model_type": "qwen9_moe", "num_experts": 4},
}


@pytest.fixture
def refusal(tmp_path, capsys):
    """What `mixcpt convert` says of a folder with this config.json and weights that nobody could read."""

    def of(values):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "model.safetensors").write_text("not weights")
        assert main(["convert", "--hf", str(folder), "--out", str(tmp_path / "ckpt")]) == 2
        assert not (tmp_path / "ckpt").exists()
        return capsys.readouterr().err

    return of


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_mixture_of_another_family_is_refused_by_name_with_what_is_supported(refusal, name):
    values = PUBLISHED[name]
    error = refusal(values)
    assert f"model_type '{values['model_type']}' is not supported; these are: {', '.join(sorted(FAMILIES))}" in error
    assert "Traceback" not in error and "pip install" not in error


@pytest.mark.parametrize("key, size", [("n_shared_experts", 1), ("shared_expert_intermediate_size", 64)])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_shared_experts_in_a_supported_family_are_refused_by_their_key(refusal, family, key, size):
    error = refusal({"model_type": family, key: size})
    assert f"{key} is not supported (experts that every token goes through)" in error
