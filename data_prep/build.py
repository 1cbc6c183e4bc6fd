"""The last stages: select, place, write prefixes, provenance, mixture and manifest."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from megatron_mixcpt.data_prep.assemble import (
    Corpus,
    Placement,
    flags_prefix,
    place,
    trained_rows,
    write_pairs,
    write_prefix,
)
from megatron_mixcpt.data_prep.config import PreprocessConfig, SourceConfig
from megatron_mixcpt.data_prep.explain import explain_mixture
from megatron_mixcpt.data_prep.format import KIND_CHOSEN
from megatron_mixcpt.data_prep.holdout import hold_out
from megatron_mixcpt.data_prep.manifest import FileEntry, describe_file, write_manifest
from megatron_mixcpt.data_prep.mix import (
    FILE_NAME,
    SPLITS,
    Mix,
    Source,
    Split,
    TokenizerEntry,
    split_from_json,
    split_to_json,
    write_mix,
)
from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.data_prep.provenance import provenance_path, write_provenance
from megatron_mixcpt.data_prep.report import write_report
from megatron_mixcpt.data_prep.selection import KEPT, STATUS_NAMES, select
from megatron_mixcpt.data_prep.shares import weighted
from megatron_mixcpt.data_prep.tokenizer import Tokenizer
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.files import write_whole

ENDINGS = (".bin", ".idx", ".flags.bin", ".flags.idx")


@dataclass
class Builder:
    """What the steps of a build share. `files` collects the description of every file written."""

    out: Path
    config: PreprocessConfig
    tokenizer: Tokenizer
    dtype: np.dtype
    receipts: Path  # folder of receipts of finished prefixes
    files: dict[str, FileEntry]


def build(
    out: Path,
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    plans: list[Plan],
    corpora: list[Corpus],
    receipts: Path,
) -> Path:
    """Write everything that follows from the parts. Returns the path of mix.json, which is written last."""
    builder = Builder(out, config, tokenizer, dtype, receipts, {})
    tokenizer.copy_to(out / "tokenizer")
    statuses = select(config, plans, corpora)
    sources, counts = [], []
    for source, plan, corpus, status in zip(config.sources, plans, corpora, statuses):
        sources.append(_build_source(builder, source, plan, corpus, status))
        counts.append(_count(source, corpus, status))
        _say(counts[-1])
        if sources[-1].valid is None and (source.heldout or config.valid_fraction > 0):
            none = (
                f"none of the held-out documents of {source.name} is left"
                if source.heldout
                else f"none of the few documents of {source.name} fell into its validation split"
            )
            _note(
                f"{none}, so nothing will tell what is forgotten of it; raise valid_fraction or name other files as "
                "heldout"
            )
    mix = Mix(
        path=out / FILE_NAME,
        seq_length=config.seq_length,
        fingerprint="",
        tokenizer=_tokenizer_entry(tokenizer, out / "tokenizer"),
        sources=tuple(weighted(config, sources)),
        seed=config.seed,
    )
    reports = write_report(out, mix, counts, plans, corpora, tokenizer.decode)
    for name in (
        "quarantine.jsonl",
        *reports,
        *(provenance_path(Path(), source.name).as_posix() for source in config.sources),
    ):
        builder.files[name] = describe_file(out / name)
    write_manifest(out, config, plans, builder.files, counts)
    for line in explain_mixture(mix):
        print(f"mixture: {line}", file=sys.stderr)
    return write_mix(out / FILE_NAME, mix).path


def _tokenizer_entry(tokenizer: Tokenizer, path: Path) -> TokenizerEntry:
    return TokenizerEntry(
        kind=tokenizer.kind,
        path=path,
        vocab_size=tokenizer.vocab_size,
        hash=tokenizer.hash,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def _build_source(builder: Builder, source: SourceConfig, plan: Plan, corpus: Corpus, status: np.ndarray) -> Source:
    config, num_documents = builder.config, len(corpus.documents)
    keep = status == KEPT
    corpus, origin, valid = hold_out(
        source,
        plan,
        corpus,
        keep,
        fraction=config.valid_fraction,
        seed=config.seed,
        piece_tokens=config.seq_length,
    )
    documents, status, keep = corpus.documents, status[origin], keep[origin]
    if len(documents) > num_documents:
        _note(
            f"{source.name} has too few texts to hold any out: pieces of {config.seq_length} tokens are, "
            f"{np.count_nonzero(keep & valid)} of {np.count_nonzero(keep)}"
        )
    sides = dict(zip(SPLITS, (keep & ~valid, keep & valid)))
    splits: dict[str, Split | None] = {}
    placements: dict[str, Placement | None] = {}
    chosen: dict[str, np.ndarray] = {}
    for name, side in sides.items():
        rows = np.flatnonzero(trained_rows(documents, side, source.responses))
        splits[name], placements[name] = _text_prefix(builder, source, corpus, rows, name)
    if splits["train"] is None and source.paths:
        _say(_count(source, corpus, status))
        raise ConfigError(f"source {source.name} has no training documents: {_where_they_went(keep)}")
    pairs: list[Split | None] = [None, None]
    if source.kind == "preference":
        chosen = {name: np.flatnonzero(side & (documents["kind"] == KIND_CHOSEN)) for name, side in sides.items()}
        pairs = [_pair_prefix(builder, source, corpus, rows, name) for name, rows in chosen.items()]
    write_provenance(provenance_path(builder.out, source.name), plan, corpus, status, valid, placements, chosen)
    return Source(source.name, source.kind, 0.0, splits["train"], splits["valid"], (pairs[0], pairs[1]), source.layout)


def _where_they_went(keep: np.ndarray) -> str:
    """Why none of the documents of a source is left to train on, and what to do."""
    if not keep.any():
        return "every record was left out, as counted above; give it more data or leave the source out"
    held_out = f"held out are all {np.count_nonzero(keep)} that are left"
    return f"{held_out}; lower valid_fraction, name files as heldout, or give it more data"


def _text_prefix(
    builder: Builder, source: SourceConfig, corpus: Corpus, rows: np.ndarray, split: str
) -> tuple[Split | None, Placement | None]:
    if len(rows) == 0:
        return None, None
    config = builder.config
    placement = place(corpus, rows, source, config.seq_length, config.seed, split)
    stem = f"{source.name}-{split}"

    def write(prefix: Path) -> tuple[Split, list[str]]:
        return write_prefix(
            prefix,
            corpus,
            placement,
            seq_length=config.seq_length,
            dtype=builder.dtype,
            pad_id=builder.tokenizer.pad_id,
        )

    key = [config.seed, config.seq_length, source.layout, builder.tokenizer.pad_id]
    return _finished(builder, corpus, rows, stem, key, write), placement


def _pair_prefix(
    builder: Builder, source: SourceConfig, corpus: Corpus, chosen: np.ndarray, split: str
) -> Split | None:
    if len(chosen) == 0:
        return None

    def write(prefix: Path) -> tuple[Split, list[str]]:
        return write_pairs(prefix, corpus, chosen, builder.dtype)

    return _finished(builder, corpus, chosen, f"{source.name}-pairs-{split}", ["pairs"], write)


def _finished(
    builder: Builder,
    corpus: Corpus,
    rows: np.ndarray,
    stem: str,
    key: list[Any],
    write: Callable[[Path], tuple[Split, list[str]]],
) -> Split:
    """A prefix; it is written unless its receipt says that it is there, whole and from the same parts."""
    state = xxhash.xxh3_128(
        orjson.dumps([stem, key, [block.hash for receipt in corpus.receipts for block in receipt.blocks]])
    )
    # Rows may be pieces of documents.
    for values in (rows, corpus.block[rows], corpus.start[rows], corpus.documents["tokens"][rows]):
        state.update(np.ascontiguousarray(values, dtype=np.int64).data)
    receipt = builder.receipts / f"{stem}-{state.hexdigest()}.json"
    if receipt.is_file():
        known = orjson.loads(receipt.read_bytes())
        files = {name: FileEntry(**entry) for name, entry in known["files"].items()}
        paths = {name: builder.out / name for name in files}
        if all(path.is_file() and describe_file(path) == files[name] for name, path in paths.items()):
            builder.files.update(files)
            split = split_from_json(builder.out, known["entry"])
            assert split is not None
            return split
    temporary = builder.out / f".{stem}"
    split, bin_hashes = write(temporary)
    hashes = dict(zip((".bin", ".flags.bin"), bin_hashes))
    name = f"{stem}-{split.content[:12]}"
    split = replace(split, prefix=builder.out / name)
    files = {}
    # The name holds the hash of the content: a reader that caches by name (megatron-core does) never meets other
    # content under an old name.
    for prefix, final in ((temporary, builder.out / name), (flags_prefix(temporary), flags_prefix(builder.out / name))):
        for ending in (".bin", ".idx"):
            os.replace(prefix.with_name(prefix.name + ending), final.with_name(final.name + ending))
    for ending in ENDINGS:
        files[name + ending] = describe_file(builder.out / (name + ending), hashes.get(ending))
    builder.files.update(files)
    write_whole(receipt, orjson.dumps({"entry": split_to_json(split), "files": files}))
    return split


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _say(count: dict[str, Any]) -> None:
    dropped = ", ".join(f"{number} {name}" for name, number in count["documents"].items() if number and name != "kept")
    kept = f"{count['documents']['kept']} documents of {count['records']} records"
    bad = f"; {count['quarantined']} records quarantined" if count["quarantined"] else ""
    if long := count["longer than seq_length"]:
        bad += f"; {long} do not fit into seq_length"
    print(f"source {count['name']}: {kept}" + (f"; left out: {dropped}" if dropped else "") + bad, file=sys.stderr)


def _count(source: SourceConfig, corpus: Corpus, status: np.ndarray) -> dict[str, Any]:
    """What became of the records of a source."""
    documents = {name: int(np.count_nonzero(status == code)) for code, name in enumerate(STATUS_NAMES)}
    return {
        "name": source.name,
        "records": corpus.num_records,
        "quarantined": sum(not item.is_too_long for item in corpus.bad),
        "longer than seq_length": sum(item.is_too_long for item in corpus.bad),
        "documents": documents,
        "flagged as contaminated": int(np.count_nonzero(corpus.documents["contaminated"])),
        "control strings in text": sum(receipt.literals for receipt in corpus.receipts),
    }
