"""Re-mixing without touching tokens: views are new indices over the same `.bin`, which is only linked to.

An index entry is 12 bytes a sequence and may point anywhere, so a subset, a repetition or another order of a source
costs nothing but its index.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_mixcpt.data_prep.assemble import content_hash, flags_prefix
from megatron_mixcpt.data_prep.build import ENDINGS
from megatron_mixcpt.data_prep.format import PAD, TARGET, Indexed, open_indexed, write_index
from megatron_mixcpt.data_prep.manifest import describe_file, write_view_manifest
from megatron_mixcpt.data_prep.mix import FILE_NAME, read_mix, write_mix
from megatron_mixcpt.data_prep.mixing import Request, resolve_shares
from megatron_mixcpt.errors import ConfigError, MixcptError


@dataclass(frozen=True)
class Wish:
    """What is asked for one source: exactly one of the three, as in the configuration."""

    weight: float | None = None
    tokens: int | None = None
    epochs: float | None = None


def remix(
    folder: str | Path,
    out: Path,
    wishes: dict[str, Wish | None],
    *,
    total_tokens: int | None = None,
    share_of: str = "tokens",
    max_epochs: float | None = None,
    seed: int | None = None,
) -> Path:
    """Write a new mix into `out` whose sources are views of those in `folder`; returns the path of its mix.json.

    Args:
        wishes: by source name; None leaves a source out; a source that is not named keeps what it asked for.
        total_tokens, share_of, max_epochs: as in the configuration of `mixcpt preprocess`.

    One pass over all views is exactly the mixture: every sequence of a source comes floor or ceil of `epochs` times.
    """
    origin, mix = read_mix(folder)
    seed = mix["seed"] if seed is None else seed
    unknown = sorted(set(wishes) - {source["name"] for source in mix["sources"]})
    if unknown:
        names = ", ".join(source["name"] for source in mix["sources"])
        raise ConfigError(f"{origin} has no source {unknown[0]!r}; it has: {names}")
    if out.exists() and any(out.iterdir()):
        raise MixcptError(f"{out} is not empty; give a new folder")
    chosen = [source for source in mix["sources"] if wishes.get(source["name"], Wish()) is not None]
    counted = "tokens" if share_of == "tokens" else "target_tokens"
    requests = [_request(source, wishes.get(source["name"]), counted, max_epochs) for source in chosen]
    shares = resolve_shares(requests, total_tokens)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(origin / mix["tokenizer"]["path"], out / "tokenizer")
    files: dict[str, dict[str, Any]] = {}
    sources = []
    for source, request, share in zip(chosen, requests, shares):
        rng = np.random.Generator(np.random.PCG64([seed, xxhash.xxh3_64_intdigest(f"view {source['name']}".encode())]))
        train = source["train"]
        count = max(1, round(share.tokens / request.available * train["sequences"]))
        entry = {**source, "train": _write_view(origin, out, train, source["name"], count, rng, files)}
        achieved = entry["train"][counted]
        entry["share"] = {
            "of": share_of,
            "requested": {key: value for key in ("weight", "tokens", "epochs") if (value := getattr(request, key))},
            "share": share.share,
            "tokens": achieved,
            "epochs": count / train["sequences"],
        }
        for other in [source["valid"], *(source.get("pairs") or {}).values()]:
            if other is not None:
                _link(origin, out, other["prefix"], files)
        sources.append(entry)
    total = sum(source["train"]["tokens"] for source in sources)
    for source in sources:
        source["weight"] = source["train"]["tokens"] / total
    write_view_manifest(out, files, mix["fingerprint"])
    return write_mix(out / FILE_NAME, {**mix, "seed": seed, "sources": sources, "view_of": mix["fingerprint"]})


def _request(source: dict[str, Any], wish: Wish | None, counted: str, max_epochs: float | None) -> Request:
    asked = vars(wish) if wish is not None else source["share"]["requested"]
    return Request(source["name"], source["train"][counted], max_epochs=max_epochs, **asked)


def view_order(num_sequences: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` sequence numbers: whole epochs, each shuffled anew, and a part of one more. int64 [count]."""
    epochs = -(-count // num_sequences)
    return np.concatenate([rng.permutation(num_sequences) for _ in range(epochs)])[:count]


def _write_view(
    origin: Path,
    out: Path,
    entry: dict[str, Any],
    source: str,
    count: int,
    rng: np.random.Generator,
    files: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    tokens, flags = open_indexed(origin / entry["prefix"]), open_indexed(flags_prefix(origin / entry["prefix"]))
    order = view_order(len(tokens), count, rng)
    hashes = [describe_file(origin / (entry["prefix"] + ending))["hash"] for ending in (".bin", ".flags.bin")]
    index_hash = xxhash.xxh3_128_hexdigest(tokens.pointers[order].tobytes())
    full_hash = content_hash(hashes, f"view {index_hash}")
    name = f"{source}-train-{full_hash[:12]}"
    for indexed, prefix, old in (
        (tokens, out / name, origin / entry["prefix"]),
        (flags, flags_prefix(out / name), flags_prefix(origin / entry["prefix"])),
    ):
        _symlink(old.with_name(old.name + ".bin"), prefix.with_name(prefix.name + ".bin"))
        index = prefix.with_name(prefix.name + ".idx")
        write_index(index, indexed.dtype, indexed.lengths[order], pointers=indexed.pointers[order])
    known = dict(zip((".bin", ".flags.bin"), hashes))
    for ending in ENDINGS:
        files[name + ending] = describe_file(out / (name + ending), known.get(ending))
    filled, targets = _counts(flags)
    return {
        "prefix": name,
        "sequences": count,
        "documents": entry["documents"],  # different ones; each may come several times
        "tokens": int(filled[order].sum()),
        "target_tokens": int(targets[order].sum()),
        "hash": full_hash,
        "index_hash": index_hash,
    }


def _counts(flags: Indexed) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are not padding, and targets, of every sequence (int64 [S] each)."""
    filled, targets = np.zeros(len(flags), np.int64), np.zeros(len(flags), np.int64)
    for first in range(0, len(flags), 1024):
        block = np.stack([flags[index] for index in range(first, min(first + 1024, len(flags)))])
        filled[first : first + len(block)] = np.count_nonzero(block & PAD == 0, axis=1)
        targets[first : first + len(block)] = np.count_nonzero(block & TARGET, axis=1)
    return filled, targets


def _link(origin: Path, out: Path, prefix: str, files: dict[str, dict[str, Any]]) -> None:
    for ending in ENDINGS:
        _symlink(origin / (prefix + ending), out / (prefix + ending))
        files[prefix + ending] = describe_file(out / (prefix + ending))


def _symlink(target: Path, link: Path) -> None:
    link.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
