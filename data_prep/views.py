"""Re-mixing without touching tokens: views are new indices over the same `.bin`, which is only linked to.

An index entry is 12 bytes a sequence and may point anywhere, so a subset, a repetition or another order of a source
costs nothing but its index.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from megatron_mixcpt.data_prep.assemble import content_hash, flags_prefix
from megatron_mixcpt.data_prep.build import ENDINGS
from megatron_mixcpt.data_prep.format import PAD, TARGET, Indexed, open_indexed, write_index
from megatron_mixcpt.data_prep.manifest import FileEntry, describe_file, write_view_manifest
from megatron_mixcpt.data_prep.mix import FILE_NAME, Source, SourceShare, Split, read_mix, write_mix
from megatron_mixcpt.data_prep.shares import Request, count, requested, resolve_shares
from megatron_mixcpt.errors import ConfigError, MixcptError


@dataclass(frozen=True)
class ShareRequest:
    """What is asked for one source: exactly one of the three, as in the configuration."""

    weight: float | None = None
    tokens: int | None = None
    epochs: float | None = None


def remix(
    folder: str | Path,
    out: Path,
    wanted: dict[str, ShareRequest | None],
    *,
    total_tokens: int | None = None,
    share_of: str | None = None,
    max_epochs: float | None = None,
    seed: int | None = None,
) -> Path:
    """Write a new mix into `out` whose sources are views of those in `folder`; returns the path of its mix.json.

    Args:
        wanted: by source name; None leaves a source out; a source that is not named keeps what it asked for.
        total_tokens, share_of, max_epochs: as in the configuration of `mixcpt preprocess`; None counts what the mix
            in `folder` counts.

    One pass over all views is exactly the mixture: every sequence of a source comes floor or ceil of `epochs` times.
    """
    mix = read_mix(folder)
    if mix.view_of is not None:
        raise ConfigError(f"{mix.folder} is a view of another mixture, with its repetitions: give that mixture instead")
    seed = mix.seed if seed is None else seed
    unknown = sorted(set(wanted) - {source.name for source in mix.sources})
    if unknown:
        names = ", ".join(source.name for source in mix.sources)
        raise ConfigError(f"{mix.folder} has no source {unknown[0]!r}; it has: {names}")
    if out.exists() and any(out.iterdir()):
        raise MixcptError(f"{out} is not empty; give a new folder")
    chosen = [source for source in mix.sources if wanted.get(source.name, ShareRequest()) is not None]
    trained = [source for source in chosen if source.train is not None]
    only_held_out = [source.name for source in chosen if source.train is None and source.name in wanted]
    if only_held_out:
        raise ConfigError(
            f"source {only_held_out[0]} of {mix.folder} is only held out: it can be dropped, not weighted"
        )
    share_of = share_of or next((source.share.of for source in trained if source.share), "tokens")
    requests = [_request(source, wanted.get(source.name), share_of, max_epochs) for source in trained]
    shares = resolve_shares(requests, total_tokens)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(mix.tokenizer.path, out / "tokenizer")
    files: dict[str, FileEntry] = {}
    views: dict[str, Source] = {}
    for source, request, share in zip(trained, requests, shares):
        rng = np.random.Generator(np.random.PCG64([seed, xxhash.xxh3_64_intdigest(f"view {source.name}".encode())]))
        train = source.train
        assert train is not None
        num_sequences = max(1, round(share.tokens / request.available * train.sequences))
        view = replace(source, train=_write_view(out, train, source.name, num_sequences, rng, files))
        epochs = num_sequences / train.sequences
        reached = SourceShare(share_of, requested(request), share.share, count(view, share_of), epochs)
        views[source.name] = replace(view, share=reached)
    for source in chosen:
        for name, split in source.splits:
            if name != "train":
                _link(split.prefix, out, files)
    total = sum(count(view, "tokens") for view in views.values())
    for name, view in views.items():
        views[name] = replace(view, weight=count(view, "tokens") / total)
    weighted = tuple(views.get(source.name, source) for source in chosen)
    write_view_manifest(out, files, mix.fingerprint)
    remixed = replace(mix, path=out / FILE_NAME, seed=seed, sources=weighted, view_of=mix.fingerprint)
    return write_mix(remixed.path, remixed).path


def _request(source: Source, wanted: ShareRequest | None, share_of: str, max_epochs: float | None) -> Request:
    if wanted is None:
        assert source.share is not None
        wanted = ShareRequest(**source.share.requested)  # type: ignore[arg-type]
    return Request(source.name, count(source, share_of), max_epochs=max_epochs, **vars(wanted))


def view_order(num_sequences: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` sequence numbers: whole epochs, each shuffled anew, and a part of one more. int64 [count]."""
    epochs = -(-count // num_sequences)
    return np.concatenate([rng.permutation(num_sequences) for _ in range(epochs)])[:count]


def _write_view(
    out: Path,
    split: Split,
    source: str,
    num_sequences: int,
    rng: np.random.Generator,
    files: dict[str, FileEntry],
) -> Split:
    tokens, flags = open_indexed(split.prefix), open_indexed(flags_prefix(split.prefix))
    order = view_order(len(tokens), num_sequences, rng)
    hashes = [describe_file(Path(f"{split.prefix}{ending}")).hash for ending in (".bin", ".flags.bin")]
    index_hash = xxhash.xxh3_128_hexdigest(tokens.pointers[order].tobytes())
    full_hash = content_hash(hashes, f"view {index_hash}")
    name = f"{source}-train-{full_hash[:12]}"
    for indexed, prefix, old in (
        (tokens, out / name, split.prefix),
        (flags, flags_prefix(out / name), flags_prefix(split.prefix)),
    ):
        _symlink(old.with_name(old.name + ".bin"), prefix.with_name(prefix.name + ".bin"))
        index = prefix.with_name(prefix.name + ".idx")
        write_index(index, indexed.dtype, indexed.lengths[order], pointers=indexed.pointers[order])
    known = dict(zip((".bin", ".flags.bin"), hashes))
    for ending in ENDINGS:
        files[name + ending] = describe_file(out / (name + ending), known.get(ending))
    filled, targets = _counts(flags)
    return Split(
        out / name,
        sequences=num_sequences,
        tokens=int(filled[order].sum()),
        content=full_hash,
        documents=split.documents,  # different ones; each may come several times
        target_tokens=int(targets[order].sum()),
        index_hash=index_hash,
    )


def _counts(flags: Indexed) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are not padding, and targets, of every sequence (int64 [S] each)."""
    filled, targets = np.zeros(len(flags), np.int64), np.zeros(len(flags), np.int64)
    for first in range(0, len(flags), 1024):
        block = np.stack([flags[index] for index in range(first, min(first + 1024, len(flags)))])
        filled[first : first + len(block)] = np.count_nonzero(block & PAD == 0, axis=1)
        targets[first : first + len(block)] = np.count_nonzero(block & TARGET, axis=1)
    return filled, targets


def _link(prefix: Path, out: Path, files: dict[str, FileEntry]) -> None:
    for ending in ENDINGS:
        link = out / (prefix.name + ending)
        _symlink(Path(f"{prefix}{ending}"), link)
        files[link.name] = describe_file(link)


def _symlink(target: Path, link: Path) -> None:
    link.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
