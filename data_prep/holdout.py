"""What is held out for validation: named files, else a share of the records by content, else pieces of long texts."""

from dataclasses import replace

import numpy as np
import xxhash

from megatron_mixcpt.data_prep.assemble import Corpus
from megatron_mixcpt.data_prep.config import SourceConfig
from megatron_mixcpt.data_prep.packing import split_lengths
from megatron_mixcpt.data_prep.plan import Plan

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def in_held_out_files(plan: Plan, documents: np.ndarray) -> np.ndarray:
    """Whether each document was read from a file of `heldout`. bool [D]."""
    return np.array([file.heldout for file in plan.files], dtype=bool)[documents["file"]]


def is_validation(documents: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which documents are for validation: by content, so equal records always fall on the same side. bool [D]."""
    return _drawn(documents["hash_low"], fraction, seed)


def _drawn(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    return _spread(hashes, seed) < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def _spread(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Neighbouring hashes must not stay neighbours."""
    return (hashes ^ np.uint64(xxhash.xxh3_64_intdigest(f"validation {seed}".encode()))) * GOLDEN


def hold_out(
    source: SourceConfig, plan: Plan, corpus: Corpus, keep: np.ndarray, *, fraction: float, seed: int, piece_tokens: int
) -> tuple[Corpus, np.ndarray, np.ndarray]:
    """Split the documents of a source.

    Args:
        keep: bool [D], the documents that are used at all.
        fraction: share of the records that is held out where the source names no files for it.
        piece_tokens: where no whole record would be held out, the texts of a source are cut into pieces of this length.

    Returns:
        The corpus, with a row for each piece where texts were cut; the row of `keep` that each of its rows belongs to
        (int64 [D']); and which of its rows are for validation (bool [D']).
    """
    rows = np.arange(len(corpus.documents))
    if source.heldout:
        return corpus, rows, in_held_out_files(plan, corpus.documents)
    valid = is_validation(corpus.documents, fraction, seed)
    if fraction == 0 or not source.is_text or (keep & valid).any():
        return corpus, rows, valid
    cut, origin = _cut(corpus, keep, piece_tokens)
    if np.count_nonzero(keep[origin]) < 2:
        return corpus, rows, valid
    hashes = cut.documents["hash_low"] + cut.offset.astype(np.uint64) * GOLDEN
    there = np.flatnonzero(keep[origin])
    valid = _drawn(hashes, fraction, seed)
    if not valid[there].any():
        valid[there[np.argmin(_spread(hashes[there], seed))]] = True
    return cut, origin, valid


def _cut(corpus: Corpus, keep: np.ndarray, size: int) -> tuple[Corpus, np.ndarray]:
    """The corpus with a row for every piece of `size` tokens, and the document each is of."""
    lengths = corpus.documents["tokens"].astype(np.int64)
    item, offset, length = split_lengths(np.where(keep, lengths, np.minimum(lengths, size)), size)
    documents = corpus.documents[item]
    documents["tokens"] = np.where(keep[item], length, lengths[item])
    # Every token of a text is a target but the first of a document, which each piece is.
    documents["targets"] = np.where(keep[item], length - 1, documents["targets"])
    pieces = replace(
        corpus,
        documents=documents,
        block=corpus.block[item],
        start=corpus.start[item] + offset,
        offset=offset,
    )
    return pieces, item
