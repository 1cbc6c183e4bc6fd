"""What stands beside the weights in a Hugging Face directory: configuration, generation settings, tokenizer, card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.config import config_dict
from megatron_mixcpt.huggingface.gguf import gguf_option

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    *TEMPLATE_FILES,
)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer and chat template of a Hugging Face directory over those in `out`; a GGUF file's are extracted by
    transformers."""
    if _has_template(source):  # of two templates readers take that of the .jinja file, whosever it is
        for name in TEMPLATE_FILES:
            (out / name).unlink(missing_ok=True)
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


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    inside = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    return inside or any((folder / name).is_file() for name in TEMPLATE_FILES)


def end_ids(eos: int | list[int] | None) -> list[int]:
    """An `eos_token_id`, of which settings have one, several or none."""
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def stop_at(out: Path, token: int) -> bool:
    """Have generation from a directory stop at `token` too. Whether it did not."""
    path = out / "generation_config.json"
    settings = json.loads((path if path.is_file() else out / "config.json").read_text())
    ends = end_ids(settings.get("eos_token_id"))
    if token in ends:
        return False
    if not path.is_file():
        settings = {key: settings[key] for key in ("bos_token_id", "pad_token_id") if key in settings}
    path.write_text(json.dumps(settings | {"eos_token_id": [*ends, token]}, indent=2) + "\n")
    return True


def _special_ids(out: Path) -> dict[str, int | None]:
    """Ids that generation needs, from the tokenizer that was copied to `out`, if any."""
    if not any((out / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(out), local_files_only=True)
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
