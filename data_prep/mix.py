"""`mix.json`: the mixture that the trainer reads, and the prefixes it names."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from megatron_mixcpt.data_prep.assemble import (
    Corpus,
    flags_prefix,
    is_validation,
    place,
    trained_rows,
    write_pairs,
    write_prefix,
)
from megatron_mixcpt.data_prep.config import Config, Source
from megatron_mixcpt.data_prep.format import KIND_CHOSEN
from megatron_mixcpt.data_prep.mixing import Request, resolve_shares
from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.data_prep.tokenizer import Tokenizer
from megatron_mixcpt.errors import MixcptError

FORMAT = "mixcpt-mix/1"
SPLITS = ("train", "valid")


def build_mix(
    out: Path, config: Config, tokenizer: Tokenizer, dtype: np.dtype, plans: list[Plan], corpora: list[Corpus]
) -> Path:
    """Write the prefixes of every source and mix.json, which names them. Returns the path of mix.json."""
    tokenizer.copy_to(out / "tokenizer")
    sources = []
    for source, corpus in zip(config.sources, corpora):
        entry: dict[str, Any] = {"name": source.name, "kind": source.kind, "weight": 0.0, "layout": source.layout}
        keep = np.ones(len(corpus.documents), dtype=bool)
        valid = is_validation(corpus.documents, config.valid_fraction, config.seed)
        for split, side in zip(SPLITS, (keep & ~valid, keep & valid)):
            rows = np.flatnonzero(trained_rows(corpus.documents, side, source.responses))
            entry[split] = _write_text(out, config, source, corpus, rows, split, dtype, tokenizer.pad_id)
        if source.kind == "preference":
            chosen = corpus.documents["kind"] == KIND_CHOSEN
            entry["pairs"] = {
                split: _write_pairs(out, source, corpus, np.flatnonzero(side & chosen), split, dtype)
                for split, side in zip(SPLITS, (keep & ~valid, keep & valid))
            }
        if entry["train"] is None:
            raise MixcptError(f"source {source.name} has no training documents; give it more data or leave it out")
        sources.append(entry)
    _set_weights(config, sources)
    mix = {
        "format": FORMAT,
        "seq_length": config.seq_length,
        "seed": config.seed,
        "tokenizer": {
            "kind": tokenizer.kind,
            "path": "tokenizer",
            "vocab_size": tokenizer.vocab_size,
            "hash": tokenizer.hash,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        },
        "sources": sources,
    }
    return write_mix(out / "mix.json", mix)


def fingerprint(mix: dict[str, Any]) -> str:
    """xxh3-128 over everything in a mix but its fingerprint."""
    body = {key: value for key, value in mix.items() if key != "fingerprint"}
    return xxhash.xxh3_128_hexdigest(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))


def write_mix(path: Path, mix: dict[str, Any]) -> Path:
    """Write a mix with its fingerprint, atomically."""
    ordered = {"format": mix["format"], "seq_length": mix["seq_length"], "seed": mix["seed"]}
    ordered["fingerprint"] = fingerprint(mix)
    ordered.update({key: value for key, value in mix.items() if key not in ordered})
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(orjson.dumps(ordered, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    os.replace(temporary, path)
    return path


def _write_text(
    out: Path,
    config: Config,
    source: Source,
    corpus: Corpus,
    rows: np.ndarray,
    split: str,
    dtype: np.dtype,
    pad_id: int,
) -> dict[str, Any] | None:
    if len(rows) == 0:
        return None
    placement = place(corpus, rows, source, config.seq_length, config.seed, split)
    stem = f"{source.name}-{split}"
    entry = write_prefix(out / f".{stem}", corpus, placement, seq_length=config.seq_length, dtype=dtype, pad_id=pad_id)
    return {"prefix": settle(out, stem, entry["hash"]), **entry}


def _write_pairs(
    out: Path, source: Source, corpus: Corpus, chosen: np.ndarray, split: str, dtype: np.dtype
) -> dict[str, Any] | None:
    if len(chosen) == 0:
        return None
    stem = f"{source.name}-pairs-{split}"
    entry = write_pairs(out / f".{stem}", corpus, chosen, dtype)
    return {"prefix": settle(out, stem, entry["hash"]), **entry}


def settle(out: Path, stem: str, content_hash: str) -> str:
    """Give a freshly written prefix (`.stem`) its final name. The name holds the hash of the content: a reader that
    caches by name (megatron-core does) can never meet other content under an old name."""
    name = f"{stem}-{content_hash[:12]}"
    for ours, final in ((out / f".{stem}", out / name), (flags_prefix(out / f".{stem}"), flags_prefix(out / name))):
        for ending in (".bin", ".idx"):
            os.replace(ours.with_name(ours.name + ending), final.with_name(final.name + ending))
    return name


def _set_weights(config: Config, sources: list[dict[str, Any]]) -> None:
    counted = "tokens" if config.share_of == "tokens" else "target_tokens"
    requests = [
        Request(source.name, entry["train"][counted], source.weight, source.tokens, source.epochs, source.max_epochs)
        for source, entry in zip(config.sources, sources)
    ]
    for entry, share in zip(sources, resolve_shares(requests, config.total_tokens)):
        entry["weight"] = share.share
