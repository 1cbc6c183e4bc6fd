"""Does a tokenizer belong to a model? Told by what it does to text, not by where it lies."""

import json
from pathlib import Path
from typing import Any

import xxhash

from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.huggingface.gguf import gguf_option

JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


def _definition(folder: Path) -> dict[str, Any]:
    """The fast tokenizer of a Hugging Face directory as the JSON of its tokenizer.json."""
    if (folder / JSON).exists():
        return json.loads((folder / JSON).read_text())
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


def _merges(definition: dict[str, Any]) -> list[tuple[str, ...]]:
    """Pairs; tokenizers below 0.20 wrote "a b" where later ones write ["a", "b"]."""
    merges = definition["model"].get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _hash(definition: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def extended_vocab_size(hf_dir: str | Path, tokenizer_dir: str | Path, vocab_size: int) -> int:
    """Embedding rows that the model of `hf_dir` (with `vocab_size`) needs for the tokenizer of `tokenizer_dir`.

    It may be the model's own or add tokens to it; then the answer is the larger of the two sizes.

    Raises:
        VerificationError: it gives some piece of text other ids than the model was trained with; both hashes are named.
    """
    folders = Path(hf_dir), Path(tokenizer_dir)
    same_pieces = _same_file(*(folder / SENTENCEPIECE for folder in folders))  # which says nothing of added tokens
    both_have_json = all((folder / JSON).is_file() for folder in folders)
    if _same_file(*(folder / JSON for folder in folders)) or (same_pieces and not both_have_json):
        return vocab_size
    own, other = map(_definition, folders)
    vocabulary, extended = _vocabulary(own), _vocabulary(other)
    same_rules = all(own.get(part) == other.get(part) for part in ("normalizer", "pre_tokenizer"))
    same_rules = same_pieces or (same_rules and _merges(own) == _merges(other))
    moved = next((token for token, i in vocabulary.items() if extended.get(token) != i), None)
    if moved is None and same_rules:
        return max(vocab_size, 1 + max(extended.values()))
    what = f"token {moved!r} has another id" if moved is not None else "it splits text by other rules"
    raise VerificationError(
        f"the tokenizer of {tokenizer_dir} ({_hash(other)}) is not that of the model in {hf_dir} ({_hash(own)}): "
        f"{what}. Preprocess with the model's own tokenizer"
    )
