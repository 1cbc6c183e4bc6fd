"""Does a tokenizer belong to a model? Told by what it does to text, not by where it lies."""

import json
from pathlib import Path
from typing import Any

import xxhash

from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.huggingface.gguf import gguf_option

FILES = ("tokenizer.json", "tokenizer.model")  # either says all about ids


def _definition(folder: Path) -> dict[str, Any]:
    """The fast tokenizer of a Hugging Face directory as the JSON of its tokenizer.json."""
    if (folder / "tokenizer.json").exists():
        return json.loads((folder / "tokenizer.json").read_text())
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **gguf_option(folder))
        return json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"{folder}: transformers cannot open its tokenizer: {error}") from error


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def _vocabulary(definition: dict[str, Any]) -> dict[str, int]:
    entries = definition["model"]["vocab"]
    base = entries if isinstance(entries, dict) else {token: i for i, (token, _) in enumerate(entries)}
    return base | {added["content"]: added["id"] for added in definition.get("added_tokens", [])}


def _hash(definition: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def extended_vocab_size(hf_dir: str | Path, tokenizer_dir: str | Path, vocab_size: int) -> int:
    """Embedding rows that the model of `hf_dir` (with `vocab_size`) needs for the tokenizer of `tokenizer_dir`.

    It may be the model's own or add tokens to it; then the answer is the larger of the two sizes.

    Raises:
        VerificationError: it gives some piece of text other ids than the model was trained with; both hashes are named.
    """
    if any(_same_file(Path(hf_dir) / name, Path(tokenizer_dir) / name) for name in FILES):
        return vocab_size
    own, other = _definition(Path(hf_dir)), _definition(Path(tokenizer_dir))
    vocabulary, extended = _vocabulary(own), _vocabulary(other)
    same_rules = all(own.get(part) == other.get(part) for part in ("normalizer", "pre_tokenizer"))
    same_model = own["model"].get("merges") == other["model"].get("merges")
    moved = next((token for token, i in vocabulary.items() if extended.get(token) != i), None)
    if moved is None and same_rules and same_model:
        return max(vocab_size, 1 + max(extended.values()))
    what = f"token {moved!r} has another id" if moved is not None else "it splits text by other rules"
    raise VerificationError(
        f"the tokenizer of {tokenizer_dir} ({_hash(other)}) is not that of the model in {hf_dir} ({_hash(own)}): "
        f"{what}. Preprocess with the model's own tokenizer"
    )
