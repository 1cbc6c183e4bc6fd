"""Open a Hugging Face directory for measuring."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.gguf import gguf_option


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries out of our own output. Call before transformers is imported."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_directory(hf_dir: str | Path, *, dtype: Any = None) -> tuple[Any, Any]:
    """The model in evaluation mode and its tokenizer; `hf_dir` may also hold an ALoRA adapter (hf_alora.py) or
    one GGUF file.

    `dtype`: torch's; fp32 when not given.

    Raises ConfigError if `hf_dir` holds no model or no tokenizer that transformers can open.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_mixcpt.hf_alora import is_alora, load_alora

    alora, named = is_alora(hf_dir), gguf_option(hf_dir)
    if not alora and not named and not (Path(hf_dir) / "config.json").is_file():
        raise ConfigError(f"{hf_dir}: no config.json; give a Hugging Face directory such as `mixcpt export` writes")
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_dir, **named)
        load = load_alora if alora else AutoModelForCausalLM.from_pretrained
        model = load(hf_dir, dtype=dtype or torch.float32, **named)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{hf_dir}: transformers cannot open it: {error}") from error
    return model.eval(), tokenizer
