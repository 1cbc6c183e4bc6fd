"""`mix.json`: the mixture that the trainer reads, sealed with a fingerprint."""

import json
import os
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megatron_mixcpt.data_prep.config import Config
from megatron_mixcpt.data_prep.mixing import Request, Share, resolve_shares
from megatron_mixcpt.data_prep.tokenizer import Tokenizer
from megatron_mixcpt.errors import ConfigError, VerificationError

FORMAT = "mixcpt-mix/2"
READABLE = ("mixcpt-mix/1", FORMAT)  # 1 knows no kind general
FILE_NAME = "mix.json"
SPLITS = ("train", "valid")


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as mix.json names it; its files lie beside mix.json."""
    return {
        "kind": tokenizer.kind,
        "path": "tokenizer",
        "vocab_size": tokenizer.vocab_size,
        "hash": tokenizer.hash,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
    }


def set_weights(config: Config, sources: list[dict[str, Any]]) -> list[Share]:
    """Give every source entry its weight (shares of tokens, summing to 1) and what was asked for and achieved."""
    counted = "tokens" if config.share_of == "tokens" else "target_tokens"
    requests = [
        Request(source.name, entry["train"][counted], source.weight, source.tokens, source.epochs, source.max_epochs)
        for source, entry in zip(config.sources, sources)
    ]
    shares = resolve_shares(requests, config.total_tokens)
    # The trainer counts tokens: a share of targets becomes the share of the tokens they come with.
    amounts = [
        share.share / request.available * entry["train"]["tokens"]
        for share, request, entry in zip(shares, requests, sources)
    ]
    for entry, share, request, amount in zip(sources, shares, requests, amounts):
        entry["weight"] = share.share if counted == "tokens" else amount / sum(amounts)
        entry["share"] = {
            "of": config.share_of,
            "requested": {key: value for key in ("weight", "tokens", "epochs") if (value := getattr(request, key))},
            "share": share.share,
            "tokens": share.tokens,
            "epochs": share.epochs,
        }
    return shares


def fingerprint(mix: dict[str, Any]) -> str:
    """xxh3-128 over everything in a mix but its fingerprint."""
    body = {key: value for key, value in mix.items() if key != "fingerprint"}
    return xxhash.xxh3_128_hexdigest(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))


def write_mix(path: Path, mix: dict[str, Any]) -> Path:
    """Write a mix with its fingerprint, atomically."""
    ordered = {"format": FORMAT, "seq_length": mix["seq_length"], "seed": mix["seed"]}
    ordered.update({key: value for key, value in mix.items() if key not in (*ordered, "fingerprint")})
    sealed = {"format": FORMAT, "fingerprint": fingerprint(ordered)}
    sealed.update(ordered)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(orjson.dumps(sealed, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    os.replace(temporary, path)
    return path


def read_mix(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the content of a mix.json (given itself or by its folder).

    Raises ConfigError if there is none, VerificationError if it was edited by hand or is of another format.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        mix = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; `mixcpt preprocess` writes it") from None
    except ValueError as error:
        raise VerificationError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(mix, dict) or mix.get("format") not in READABLE:
        raise VerificationError(f"{path} is not a {FORMAT} file")
    if mix.get("fingerprint") != fingerprint(mix):
        raise VerificationError(
            f"{path} does not match its fingerprint: change mixtures with `mixcpt mix`, not by hand"
        )
    return path.parent, mix


def prefixes(mix: dict[str, Any]) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Every prefix a mix names: (source entry, split or 'pairs/split', prefix entry)."""
    found = []
    for source in mix["sources"]:
        for split in SPLITS:
            if source[split] is not None:
                found.append((source, split, source[split]))
        for split, entry in (source.get("pairs") or {}).items():
            if entry is not None:
                found.append((source, f"pairs/{split}", entry))
    return found
