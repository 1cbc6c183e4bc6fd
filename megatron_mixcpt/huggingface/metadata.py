"""What stands beside the weights in a Hugging Face directory: configuration, generation settings, tokenizer, card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.config import config_dict
from megatron_mixcpt.huggingface.gguf import gguf_option

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer and chat template of a Hugging Face directory; a GGUF file's are extracted by transformers."""
    if gguf := gguf_option(source):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(str(source), **gguf).save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def write_metadata(
    out: Path,
    arch: Architecture,
    dtype: torch.dtype,
    tokenizer_dir: str | Path | None,
    source_dir: str | Path | None,
    card: str | None,
) -> None:
    """config.json, generation_config.json, tokenizer files and README.md. Arguments as in `hf.save_hf`."""
    source = Path(source_dir) if source_dir else None
    tokenizer = Path(tokenizer_dir) if tokenizer_dir else None
    for folder in (source, tokenizer):  # the second over the first: it may add tokens to the model's own
        if folder:
            copy_tokenizer(folder, out)
    config: dict[str, Any]
    if source and (source / "config.json").exists():
        config = json.loads((source / "config.json").read_text())
        config["vocab_size"] = arch.vocab_size
        config.pop("auto_map", None)  # of code that is not copied: transformers' own class reads these weights
        if (source / "generation_config.json").exists():
            shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
    else:
        config = config_dict(arch) | _special_ids(out)
    # transformers 5 reads the first, 4 the second
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if card is not None:
        (out / "README.md").write_text(card)


def _special_ids(out: Path) -> dict[str, int | None]:
    """Ids that generation needs, from the tokenizer that was copied to `out`, if any."""
    if not any((out / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(out), local_files_only=True)
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
