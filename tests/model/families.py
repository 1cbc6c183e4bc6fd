"""Small random Hugging Face models of every supported family, made by transformers itself, and what they hold."""

import shutil

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from tests.helpers.corpus import write_mix

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 20000.0}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
BASE = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
OLDER = transformers.__version__.startswith("4.")
# name -> (transformers' class stem, what differs from BASE)
FAMILIES = {
    "llama-untied": ("Llama", {}),
    "llama-tied-llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "num_key_value_heads": 6},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 12, "num_key_value_heads": 2}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", {"sliding_window": 5, "layer_types": WINDOWS, "head_dim": 12}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3-multi-query": ("Qwen3", {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "qwen3-windows-yarn": (
        "Qwen3",
        {
            "head_dim": 16,
            "rope_parameters": YARN,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    "llama-longrope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 9,  # some documents are longer, some are not
                "short_factor": [1.0, 1.1, 1.3, 2.0],
                "long_factor": [1.0, 2.0, 4.0, 9.0],
            }
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 5,
            "layer_types": WINDOWS,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
        },
    ),
    "phi3": ("Phi3", {}),
    "phi4-mini": (
        "Phi3",
        {
            "sliding_window": 11,
            "original_max_position_embeddings": 9,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "attention_factor": 1.2,
                "short_factor": [1.0, 1.3, 3.0],
                "long_factor": [1.0, 4.0, 16.0],
            },
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "num_attention_heads": 4,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "layer_types": WINDOWS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": PLAIN,
            },
        },
    ),
    "qwen3-experts": (
        "Qwen3Moe",
        {
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-experts-windows": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
}


def absent(name):
    """Why transformers cannot make the model here; empty where it can."""
    stem, _ = FAMILIES[name]
    if name == "llama-longrope" and OLDER:
        return f"transformers {transformers.__version__} takes the factor of longrope from elsewhere"
    known = hasattr(transformers, f"{stem}ForCausalLM")
    return "" if known else f"transformers {transformers.__version__} has no {stem}"


def in_words_of_4(differing):
    """The same with the keys that transformers had before 5 in place of `rope_parameters`."""
    differing = dict(differing)
    rope = differing.pop("rope_parameters", None)
    if rope is None:
        return differing
    if "full_attention" in rope:
        rope, local = rope["full_attention"], rope["sliding_attention"]
        differing["rope_local_base_freq"] = local["rope_theta"]
    rope = dict(rope)
    differing["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:  # of Phi-3, which knows these keys alone
        differing["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope = {"type": rope["rope_type"], "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    if rope.get("rope_type") != "default":
        differing["rope_scaling"] = rope
    return differing


def make(name, out, dtype=torch.float32, shard_size="5GB", **changes):
    """Save the model to `out` and return it, evaluating, with eager attention."""
    stem, differing = FAMILIES[name]
    if absent(name):
        pytest.skip(absent(name))
    if OLDER:
        differing = in_words_of_4(differing)
    configs = [f"{stem}TextConfig", f"{stem}Config"]
    config_class = next(getattr(transformers, name) for name in configs if hasattr(transformers, name))
    config = config_class(**{**BASE, **differing, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{stem}ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:  # else all zeros and ones
                parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    model.save_pretrained(out, max_shard_size=shard_size)
    return model


def make_with_mix(family, model, data, **settings):
    """A model with its tokenizer in `model`, and in `data` a mixture of random tokens for it; returns its mix.json."""
    size = make_tokenizer(model)
    make(family, model, vocab_size=size, **settings)
    mix = write_mix(data, vocab_size=size)
    shutil.copytree(model, data / "tokenizer", ignore=shutil.ignore_patterns("model*", "*config.json"))
    shutil.copy(model / "tokenizer_config.json", data / "tokenizer")
    return mix


def make_tokenizer(out, added=(), merges=("a b", "ab c")):
    """A byte-level BPE of 301 - 2 entries or so, saved as a Hugging Face tokenizer."""
    pieces = ["<s>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    pieces += [merge.replace(" ", "") for merge in merges]
    bpe = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [tuple(m.split()) for m in merges])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrapped.add_tokens(list(added))
    wrapped.save_pretrained(out)
    return len(wrapped)


def read_all(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_bits(source, out):
    expected, actual = read_all(source), read_all(out)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
