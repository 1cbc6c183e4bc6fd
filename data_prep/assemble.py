"""From parts to prefixes: shuffle, pack, write `.bin/.idx` and flags.

All decisions are made on the document tables, in chunk order and with seeded generators, so the bytes depend on the
inputs and the configuration alone. Only table rows are held in memory; tokens are copied from mapped parts.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_mixcpt.data_prep.config import SourceConfig
from megatron_mixcpt.data_prep.format import (
    DOC_START,
    KIND_REJECTED,
    PAD,
    ROLE_ASSISTANT,
    ROLE_MASK,
    ROLE_SHIFT,
    TARGET,
    IndexedWriter,
)
from megatron_mixcpt.data_prep.mix import Split
from megatron_mixcpt.data_prep.packing import best_fit, split_lengths
from megatron_mixcpt.data_prep.parts import DOCUMENT_DTYPE, Block, Receipt, Unusable, open_block, read_receipt
from megatron_mixcpt.data_prep.plan import Plan

WRITE_TOKENS = 1 << 21  # copied between two writes


@dataclass
class Corpus:
    """All documents of one source: their table, and where their tokens are."""

    blocks: list[Block]
    documents: np.ndarray  # DOCUMENT_DTYPE [D]
    block: np.ndarray  # int64 [D], block a document is in
    start: np.ndarray  # int64 [D], its first token in that block
    offset: np.ndarray  # int64 [D], its first token in its record: 0 unless texts were cut (see holdout)
    receipts: list[Receipt]

    @property
    def num_records(self) -> int:
        return sum(receipt.records for receipt in self.receipts)

    @property
    def bad(self) -> list[Unusable]:
        """Records that were left out, in the order of the files."""
        return [item for receipt in self.receipts for item in receipt.bad]


def load_corpus(plan: Plan, folder: Path, dtype: np.dtype) -> Corpus:
    """Map the parts of a source, in chunk order. All of them must be good (see parts.part_is_good)."""
    blocks, receipts = [], []
    for chunk in range(len(plan.chunks)):
        receipt = read_receipt(folder, chunk)
        assert receipt is not None
        receipts.append(receipt)
        blocks += [open_block(folder, entry, dtype) for entry in receipt.blocks]
    tables = [block.documents for block in blocks]
    documents = np.concatenate(tables) if tables else np.zeros(0, DOCUMENT_DTYPE)
    starts = [np.concatenate([[0], np.cumsum(table["tokens"], dtype=np.int64)[:-1]]) for table in tables if len(table)]
    return Corpus(
        blocks=blocks,
        documents=documents,
        block=np.repeat(np.arange(len(blocks)), [len(table) for table in tables]),
        start=np.concatenate(starts) if starts else np.zeros(0, np.int64),
        offset=np.zeros(len(documents), np.int64),
        receipts=receipts,
    )


@dataclass(frozen=True)
class Placement:
    """Where every piece of a prefix goes, in the order of the output."""

    num_sequences: int
    document: np.ndarray  # int64 [P], row in the corpus
    offset: np.ndarray  # int64 [P], first token of the piece within its document
    length: np.ndarray  # int64 [P]
    sequence: np.ndarray  # int64 [P], ascending
    position: np.ndarray  # int64 [P], of the first token within its sequence


def place(
    corpus: Corpus,
    rows: np.ndarray,
    source: SourceConfig,
    seq_length: int,
    seed: int,
    split: str,
    *,
    shuffle: bool = True,
) -> Placement:
    """Shuffle the documents `rows` and lay them into sequences of `seq_length` tokens.

    Without `shuffle` documents and sequences keep their order, which only serves to measure what shuffling costs.
    """
    rng = np.random.Generator(np.random.PCG64([seed, xxhash.xxh3_64_intdigest(f"{source.name}/{split}".encode())]))
    rows = rows[rng.permutation(len(rows))] if shuffle else rows
    lengths = corpus.documents["tokens"][rows].astype(np.int64)
    if source.layout == "concat":
        return _concatenated(rows, lengths, seq_length)
    item, offset, length = split_lengths(lengths, seq_length)
    bins, num_bins = best_fit(length, seq_length)
    if shuffle:  # best-fit groups by length
        bins = rng.permutation(num_bins)[bins]
    order = np.argsort(bins, kind="stable")
    bins, length = bins[order], length[order]
    before = np.cumsum(length) - length
    first = np.searchsorted(bins, np.arange(num_bins))
    position = before - np.repeat(before[first], np.diff([*first, len(bins)])) if num_bins else before
    return Placement(num_bins, rows[item[order]], offset[order], length, bins, position)


def _concatenated(rows: np.ndarray, lengths: np.ndarray, seq_length: int) -> Placement:
    """One stream cut every seq_length tokens, wherever that falls."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(0, total, seq_length)) if total else np.zeros(1, np.int64)
    begin, length = cuts[:-1] if cuts[0] == 0 else cuts, np.diff(cuts)
    item = np.searchsorted(ends, begin, side="right")
    return Placement(
        num_sequences=-(-total // seq_length),
        document=rows[item] if total else rows,
        offset=begin - (ends - lengths)[item] if total else np.zeros(0, np.int64),
        length=length,
        sequence=begin // seq_length,
        position=begin % seq_length,
    )


def write_prefix(
    prefix: Path, corpus: Corpus, placement: Placement, *, seq_length: int, dtype: np.dtype, pad_id: int
) -> tuple[Split, list[str]]:
    """Write tokens and flags of a prefix whose sequences all have `seq_length` tokens; also returns the hashes of both
    `.bin` files."""
    num_tokens = num_targets = 0
    with (
        IndexedWriter(prefix, dtype) as writer,
        IndexedWriter(flags_prefix(prefix), np.dtype(np.uint8)) as marker,
        ThreadPoolExecutor(2) as threads,
    ):
        writing: list[Future[None]] = []
        for tokens, flags in _filled(corpus, placement, seq_length, dtype, pad_id):
            for behind in writing:  # one step is written while the next is filled
                behind.result()
            lengths = np.full(len(tokens) // seq_length, seq_length)
            writing = [threads.submit(writer.add, tokens, lengths), threads.submit(marker.add, flags, lengths)]
            num_tokens += int(np.count_nonzero((flags & PAD) == 0))
            num_targets += int(np.count_nonzero(flags & TARGET))
        for behind in writing:
            behind.result()
        hashes = list(threads.map(IndexedWriter.finish, (writer, marker)))
    split = Split(
        prefix,
        sequences=placement.num_sequences,
        tokens=num_tokens,
        content=content_hash(hashes, str(seq_length)),
        documents=len(np.unique(placement.document)),
        target_tokens=num_targets,
    )
    return split, hashes


def _filled(
    corpus: Corpus, placement: Placement, seq_length: int, dtype: np.dtype, pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and flags of a few sequences at a time, each filled up to its length with padding."""
    step = max(1, WRITE_TOKENS // seq_length)
    for first in range(0, placement.num_sequences, step):
        last = min(first + step, placement.num_sequences)
        begin, end = np.searchsorted(placement.sequence, [first, last])
        tokens = np.full((last - first) * seq_length, pad_id, dtype=dtype)
        flags = np.full(len(tokens), PAD, dtype=np.uint8)
        target = (placement.sequence[begin:end] - first) * seq_length + placement.position[begin:end]
        rows = placement.document[begin:end]
        source = corpus.start[rows] + placement.offset[begin:end]
        length = placement.length[begin:end]
        for block, at, to, size in zip(corpus.block[rows].tolist(), source.tolist(), target.tolist(), length.tolist()):
            tokens[to : to + size] = corpus.blocks[block].tokens[at : at + size]
            flags[to : to + size] = corpus.blocks[block].flags[at : at + size]
        # A piece is a document of its own: its first token has nothing before it to be predicted from.
        flags[target] = (flags[target] | DOC_START) & ~np.uint8(TARGET)
        filled = np.zeros(last - first, dtype=np.int64)
        np.maximum.at(filled, placement.sequence[begin:end] - first, placement.position[begin:end] + length)
        padded = np.flatnonzero(filled < seq_length)
        flags[padded * seq_length + filled[padded]] |= DOC_START
        yield tokens, flags


def write_pairs(prefix: Path, corpus: Corpus, chosen: np.ndarray, dtype: np.dtype) -> tuple[Split, list[str]]:
    """Write preference pairs for DPO: each document of the prefix has two sequences, chosen and rejected.

    `chosen` are the rows of the chosen answers; the row after each is its rejected one. Targets are the answers alone.
    """
    num_tokens = num_targets = 0
    with IndexedWriter(prefix, dtype) as writer, IndexedWriter(flags_prefix(prefix), np.dtype(np.uint8)) as marker:
        for row in np.stack([chosen, chosen + 1], axis=1).reshape(-1).tolist():
            block, start = corpus.blocks[corpus.block[row]], corpus.start[row]
            length = int(corpus.documents["tokens"][row])
            flags = block.flags[start : start + length] & ~np.uint8(TARGET)
            answer = last_answer(flags)
            flags[answer] |= TARGET
            writer.add(block.tokens[start : start + length])
            marker.add(flags)
            num_tokens += length
            num_targets += answer.stop - answer.start
        ends = np.arange(0, 2 * len(chosen) + 1, 2)
        hashes = [writer.finish(ends), marker.finish(ends)]
    split = Split(
        prefix,
        sequences=2 * len(chosen),
        tokens=num_tokens,
        content=content_hash(hashes, "pairs"),
        documents=len(chosen),
        target_tokens=num_targets,
    )
    return split, hashes


def last_answer(flags: np.ndarray) -> slice:
    """The tokens of the last answer of a conversation; the first token of a document never belongs to it."""
    spoken = (flags & ROLE_MASK) == ROLE_ASSISTANT << ROLE_SHIFT
    end = int(np.flatnonzero(spoken)[-1]) + 1
    before = np.flatnonzero(~spoken[:end])
    return slice(max(1, int(before[-1]) + 1 if len(before) else 0), end)


def content_hash(bin_hashes: list[str], shape: str) -> str:
    """The hash of a prefix: over its tokens, its flags and how they are cut into sequences."""
    return xxhash.xxh3_128_hexdigest(" ".join([*bin_hashes, shape]).encode())


def flags_prefix(prefix: Path) -> Path:
    """The prefix of the flags that belong to `prefix`."""
    return prefix.with_name(prefix.name + ".flags")


def trained_rows(documents: np.ndarray, keep: np.ndarray, responses: str) -> np.ndarray:
    """Mask [D] of the documents that are trained on as text: of a pair the chosen one, or both."""
    return keep if responses == "both" else keep & (documents["kind"] != KIND_REJECTED)
