"""What a worker does with one chunk: read, render, encode, write a part and its receipt."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_mixcpt.data_prep.assemble import last_answer
from megatron_mixcpt.data_prep.config import SourceConfig
from megatron_mixcpt.data_prep.decontaminate import Detector
from megatron_mixcpt.data_prep.documents import Batch, Document
from megatron_mixcpt.data_prep.engines import Engine
from megatron_mixcpt.data_prep.format import ROLE_ASSISTANT, ROLE_MASK, ROLE_SHIFT, TARGET, TEXT_KINDS
from megatron_mixcpt.data_prep.joining import Joining
from megatron_mixcpt.data_prep.neardup import Signer
from megatron_mixcpt.data_prep.parts import (
    DOCUMENT_DTYPE,
    TOO_LONG,
    BlockEntry,
    Receipt,
    Unusable,
    write_block,
    write_receipt,
)
from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.data_prep.readers import read_span
from megatron_mixcpt.data_prep.records import Renderer
from megatron_mixcpt.data_prep.template import BadRecord

COLUMNS = ("hash_high", "hash_low", "line", "file", "kind", "contaminated")
BATCH_CHARACTERS = 1 << 19  # encoded in one call
BLOCK_TOKENS = 1 << 22  # held in memory before a block is written


@dataclass
class Job:
    """All a worker needs to turn any chunk of one source into a part."""

    source: SourceConfig
    plan: Plan
    folder: Path
    render: Renderer
    engine: Engine
    joining: Joining | None
    dtype: np.dtype
    max_tokens: int | None  # longest document that may not be split; None: any length
    max_record_bytes: int
    count_literals: Callable[[list[str]], int]
    detector: Detector | None = None
    signer: Signer | None = None


def process_chunk(job: Job, chunk: int) -> Receipt:
    """Write the part of `chunk`; returns its receipt."""
    part = _Part(job, chunk)
    for span in job.plan.chunks[chunk]:
        for line, record in read_span(job.plan.files[span.file], span, job.max_record_bytes, job.source.keys):
            part.take(span.file, line, record)
    return part.finish()


class _Part:
    """The part under construction: a batch not yet encoded, and a block not yet written."""

    def __init__(self, job: Job, chunk: int) -> None:
        self._job, self._chunk = job, chunk
        self._batch = Batch(job.joining)
        self._rows: list[tuple[int, int, int, int, int, bool]] = []  # of DOCUMENT_DTYPE: COLUMNS
        self._records: list[int] = []  # number of documents of each record in the batch
        self._tokens: list[np.ndarray] = []
        self._flags: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._texts: list[str] = []  # only where something looks at them
        self._signatures: list[np.ndarray] = []
        self._num_tokens = 0
        self._blocks: list[BlockEntry] = []
        self._bad: list[Unusable] = []
        self._num_records = 0
        self._num_literals = 0

    def take(self, file: int, line: int, record: dict[str, Any] | BadRecord) -> None:
        self._num_records += 1
        if isinstance(record, BadRecord):
            self._quarantine(file, line, record)
            return
        try:
            documents = self._job.render(record)
        except BadRecord as bad:
            self._quarantine(file, line, bad)
            return
        digest = _content_hash(documents)
        high, low = digest >> 64, digest & 0xFFFFFFFFFFFFFFFF
        contaminated = False
        if self._job.detector is not None or self._job.signer is not None:
            text = _plain_text(documents)
            contaminated = self._job.detector is not None and self._job.detector.contaminated(text)
            self._texts += [text] * len(documents)
        for document in documents:
            self._batch.add(document.pieces)
            self._rows.append((high, low, line, file, document.kind, contaminated))
        self._records.append(len(documents))
        if self._batch.num_characters >= BATCH_CHARACTERS:
            self._encode()

    def finish(self) -> Receipt:
        self._encode()
        self._write_block()
        receipt = Receipt(
            chunk=self._chunk,
            plan=self._job.plan.key,
            engine=self._job.engine.name,
            records=self._num_records,
            literals=self._num_literals,
            blocks=self._blocks,
            bad=sorted(self._bad, key=lambda item: (item.file, item.line)),
        )
        write_receipt(self._job.folder, receipt)
        return receipt

    def _quarantine(self, file: int, line: int, bad: BadRecord) -> None:
        self._bad.append(Unusable(file, line, bad.reason, bad.detail))

    def _encode(self) -> None:
        if not self._rows:
            return
        self._num_literals += self._job.count_literals(self._batch.texts)
        tokens, flags, lengths = self._batch.encode(self._job.engine)
        if self._job.source.too_long == "truncate" and self._job.max_tokens is not None:
            pairs = self._job.source.kind == "preference"
            tokens, flags, lengths = truncated(tokens, flags, lengths, self._job.max_tokens, whole_prompt=pairs)
        documents = np.zeros(len(lengths), dtype=DOCUMENT_DTYPE)
        for name, column in zip(COLUMNS, zip(*self._rows)):
            documents[name] = np.array(column, dtype=DOCUMENT_DTYPE[name])
        documents["tokens"] = lengths
        ends = np.cumsum(lengths)
        targets = np.concatenate([[0], np.cumsum(flags & TARGET, dtype=np.int64)])
        documents["targets"] = targets[ends] - targets[ends - lengths]
        signatures = self._job.signer.signatures(self._texts) if self._job.signer else None
        limit = self._job.max_tokens
        if lengths.min() == 0 or (limit is not None and lengths.max() > limit):
            keep = self._usable(documents, limit)
            chosen = np.repeat(keep, lengths)
            tokens, flags, documents = tokens[chosen], flags[chosen], documents[keep]
            signatures = None if signatures is None else signatures[keep]
        self._tokens.append(tokens.astype(self._job.dtype))
        self._flags.append(flags)
        self._documents.append(documents)
        if signatures is not None:
            self._signatures.append(signatures)
        self._num_tokens += len(tokens)
        self._batch, self._rows, self._records, self._texts = Batch(self._job.joining), [], [], []
        if self._num_tokens >= BLOCK_TOKENS:
            self._write_block()

    def _usable(self, documents: np.ndarray, limit: int | None) -> np.ndarray:
        """Which documents stay: a conversation is never cut, so a record with one that does not fit goes."""
        keep = np.ones(len(documents), dtype=bool)
        start = 0
        for count in self._records:
            rows = documents[start : start + count]
            shortest, longest = int(rows["tokens"].min()), int(rows["tokens"].max())
            bad = None
            if shortest == 0:
                bad = BadRecord("no tokens", "the tokenizer leaves nothing of the text")
            elif limit is not None and longest > limit:
                bad = BadRecord(TOO_LONG, f"{longest} tokens; seq_length is {limit}")
            if bad is not None:
                keep[start : start + count] = False
                self._quarantine(int(rows["file"][0]), int(rows["line"][0]), bad)
            start += count
        return keep

    def _write_block(self) -> None:
        if not self._documents:
            return
        name = f"{self._chunk:06d}-{len(self._blocks):03d}.part"
        tokens, flags, documents = (np.concatenate(each) for each in (self._tokens, self._flags, self._documents))
        signatures = np.concatenate(self._signatures) if self._signatures else None
        self._blocks.append(write_block(self._job.folder, name, tokens, flags, documents, signatures))
        self._tokens, self._flags, self._documents, self._signatures, self._num_tokens = [], [], [], [], 0


def truncated(
    tokens: np.ndarray, flags: np.ndarray, lengths: np.ndarray, limit: int, *, whole_prompt: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conversations without what lies beyond `limit` tokens.

    One that would keep nothing of an answer (of its last one, with `whole_prompt`) stays as it is: too long.
    """
    ends = np.cumsum(lengths)
    cut = lengths.copy()
    for index in np.flatnonzero(lengths > limit).tolist():
        marks = flags[ends[index] - lengths[index] : ends[index]]
        answer = np.flatnonzero((marks & ROLE_MASK) == ROLE_ASSISTANT << ROLE_SHIFT)
        if len(answer) and (last_answer(marks).start if whole_prompt else max(1, answer[0])) < limit:
            cut[index] = limit
    position = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    inside = position < np.repeat(cut, lengths)
    return tokens[inside], flags[inside], cut


def _plain_text(documents: list[Document]) -> str:
    return " ".join(content for document in documents for content, _ in document.pieces if isinstance(content, str))


def _content_hash(documents: list[Document]) -> int:
    """128 bits over the kind, roles and text of a record; neither the tokenizer nor the loss mask changes it.

    Plain text is the same record whether it is called domain or general.
    """
    if len(documents) == 1 and documents[0].kind in TEXT_KINDS.values():
        for content, _ in documents[0].pieces:
            if type(content) is str:
                return xxhash.xxh3_128_intdigest(content.encode())
    state = xxhash.xxh3_128()
    for document in documents:
        for content, flags in document.pieces:
            if isinstance(content, str):
                data = content.encode()
                state.update(b"%d %d %d\n" % (document.kind, flags & ROLE_MASK, len(data)))
                state.update(data)
    return state.intdigest()
