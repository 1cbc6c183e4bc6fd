"""From a prepared mixture back to its records: the instructions and pairs of stage 1, with and without a chat template.

Every record is read from its source file again (the provenance says where it stands) and encoded in the variants that
are scored; one Megatron prefix holds them all, so that every rank reads them without copies.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.data_prep.assemble import flags_prefix, last_answer
from megatron_mixcpt.data_prep.config import PreprocessConfig, SourceConfig
from megatron_mixcpt.data_prep.documents import Batch, Document
from megatron_mixcpt.data_prep.format import KIND_CHOSEN, KIND_INSTRUCTION, TARGET, IndexedWriter, token_dtype
from megatron_mixcpt.data_prep.manifest import Manifest, read_manifest
from megatron_mixcpt.data_prep.parts import hash_file
from megatron_mixcpt.data_prep.plan import scan_file
from megatron_mixcpt.data_prep.provenance import provenance_path
from megatron_mixcpt.data_prep.readers import read_span
from megatron_mixcpt.data_prep.records import Renderer, make_renderer
from megatron_mixcpt.data_prep.template import BadRecord
from megatron_mixcpt.data_prep.tokenizer import Tokenizer, load_tokenizer
from megatron_mixcpt.errors import ConfigError, MixcptError, VerificationError
from megatron_mixcpt.files import write_json
from megatron_mixcpt.select.config import SelectConfig

FOLDER, PREFIX, RECORDS, RECEIPT, LEFT_OUT = "candidates", "variants", "records.jsonl", "receipt.json", "left_out.jsonl"
PLAIN, CHAT, REJECTED = "plain", "chat", "rejected"
REJECTED_CHAT = "rejected, chat"  # not scored: training takes both answers, so both must fit
SPAN_BYTES = 1 << 22
ENCODE_CHARACTERS = 1 << 19


@dataclass(frozen=True)
class Candidates:
    """What there is to score, in a folder."""

    folder: Path
    fingerprint: str
    num_records: int
    """Lines of `records.jsonl`: source, kind, file, line, the record, and which sequence each variant is."""

    @property
    def prefix(self) -> Path:
        """Token and flag sequences of all variants. Only tokens of the response are targets, no control tokens."""
        return self.folder / PREFIX

    def records(self) -> Iterator[dict[str, Any]]:
        with open(self.folder / RECORDS) as file:
            yield from map(json.loads, file)


def prepare_candidates(config: SelectConfig) -> Candidates:
    """Read and encode the records of `data.mix`, unless the output folder holds them already. One process.

    Raises:
        ConfigError: the mixture cannot be selected from; names the key and the fix.
        VerificationError: an input file is not the one that the mixture was made from.
    """
    mix = open_mix(config.data.mix)
    folder = mix.folder
    try:
        manifest = read_manifest(folder)
    except MixcptError as error:
        raise ConfigError(f"data.mix: {error}: preprocess again") from None
    if manifest.config is None:
        raise ConfigError(f"data.mix: {folder} is a view, made by `mixcpt mix`: name the mixture that it was made from")
    prepared = manifest.config
    sources = [source for source in prepared.sources if not source.is_text]
    if not sources:
        raise ConfigError(f"data.mix: {folder} has neither instructions nor preference pairs to select from")
    tokenizer = load_tokenizer(mix.tokenizer.path, eos_token=mix.tokenizer.eos_id)
    if config.select.format == "chat" and tokenizer.chat_template is None:
        raise ConfigError(
            f"select.format chat: the tokenizer of {folder} has no chat template; set select.format=plain, or "
            "preprocess with a tokenizer that has one"
        )
    out = Path(config.out) / FOLDER
    fingerprint = xxhash.xxh3_128_hexdigest(f"{mix.fingerprint} {config.select.format}".encode())
    try:
        known = json.loads((out / RECEIPT).read_text())
    except (OSError, ValueError):
        known = {}
    if known.get("fingerprint") == fingerprint:
        return Candidates(out, fingerprint, known["records"])
    for source in sources:
        _check_inputs(manifest, source)
    out.mkdir(parents=True, exist_ok=True)
    (out / RECEIPT).unlink(missing_ok=True)
    count = _write(out, folder, prepared, sources, tokenizer, config.select.format == CHAT)
    if count == 0:
        raise ConfigError(f"data.mix: no record of {folder} can be scored; {out / LEFT_OUT} says why")
    write_json(out / RECEIPT, {"fingerprint": fingerprint, "records": count})
    return Candidates(out, fingerprint, count)


def _check_inputs(manifest: Manifest, source: SourceConfig) -> None:
    for entry in manifest.inputs:
        path = Path(entry.path)
        if entry.source != source.name:
            continue
        if not path.is_file():
            raise ConfigError(
                f"data.mix: its source {source.name} was read from {path}, which is not there: run this where it was "
                "preprocessed (paths are relative), or put the file back"
            )
        if path.stat().st_size != entry.size or hash_file(path) != entry.hash:
            raise VerificationError(f"{path} has changed since source {source.name} was preprocessed: preprocess again")


def _write(
    out: Path, folder: Path, prepared: PreprocessConfig, sources: list[SourceConfig], tokenizer: Tokenizer, chat: bool
) -> int:
    writer = _Writer(out, tokenizer, prepared.seq_length)
    with open(out / RECORDS, "w") as records, open(out / LEFT_OUT, "w") as left_out:
        for source in sources:
            before = writer.num_records
            variants = _variants(source, prepared, tokenizer, chat)
            for file, line, record in _training_records(folder, source, prepared.max_record_bytes):
                head = {"source": source.name, "kind": source.kind, "file": file, "line": line}
                try:
                    documents = _render(variants, record)
                except BadRecord as bad:
                    left_out.write(json.dumps({**head, "reason": bad.reason, "detail": bad.detail}) + "\n")
                    continue
                writer.add({**head, "record": record}, documents, records, left_out)
            writer.flush(records, left_out)
            print(f"source {source.name}: {writer.num_records - before} records to score", file=sys.stderr)
    writer.finish()
    return writer.num_records


def _variants(
    source: SourceConfig, prepared: PreprocessConfig, tokenizer: Tokenizer, chat: bool
) -> dict[str, Renderer]:
    add_bos = tokenizer.adds_bos if prepared.add_bos is None else prepared.add_bos

    def renderer(form: str) -> Renderer:
        changes = {"format": form, "loss": "answer", "tools": source.tools if form == CHAT else None}
        return make_renderer(source.model_copy(update=changes), tokenizer, add_bos=add_bos)

    return {PLAIN: renderer(PLAIN), **({CHAT: renderer(CHAT)} if chat else {})}


def _render(variants: dict[str, Renderer], record: dict[str, Any]) -> dict[str, Document]:
    documents: dict[str, Document] = {}
    for name, render in variants.items():
        for document in render(record):
            if document.kind in (KIND_INSTRUCTION, KIND_CHOSEN):
                documents[name] = document
            elif name == PLAIN:
                documents[REJECTED] = document
            else:
                documents[REJECTED_CHAT] = document
    return documents


def _training_records(
    folder: Path, source: SourceConfig, max_record_bytes: int
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(file, line, record) of every record that training may draw."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(provenance_path(folder, source.name), columns=["file", "line", "status", "split"])
    table = table.filter(pc.and_(pc.equal(table["status"], "kept"), pc.equal(table["split"], "train")))
    lines: dict[str, set[int]] = {}
    for file, line in zip(table["file"].to_pylist(), table["line"].to_pylist()):
        lines.setdefault(file, set()).add(line)
    for name, wanted in lines.items():
        file, spans = scan_file(Path(name), 0, SPAN_BYTES, text_allowed=True)
        ends = [span.line for span in spans[1:]] + [2**63]
        for span, end in zip(spans, ends):
            if any(span.line <= line < end for line in wanted):
                for line, record in read_span(file, span, max_record_bytes, source.keys):
                    if line in wanted and not isinstance(record, BadRecord):
                        yield name, line, dict(record)


def _response(flags: np.ndarray, head: dict[str, Any]) -> np.ndarray:
    """Flags whose targets are the response alone: of a preference record, whose turns agree up to there, the last."""
    if head["kind"] != "preference":
        return flags
    inside = np.zeros(len(flags), dtype=bool)
    inside[last_answer(flags)] = True
    return np.where(inside, flags, flags & ~np.uint8(TARGET))


class _Writer:
    """Encodes documents many at a time and appends their sequences to the prefix."""

    def __init__(self, out: Path, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        prefix = out / PREFIX
        self._tokens = IndexedWriter(prefix, token_dtype(tokenizer.vocab_size))
        self._flags = IndexedWriter(flags_prefix(prefix), np.dtype(np.uint8))
        self._control = np.array(sorted(tokenizer.control.values()), dtype=np.int64)
        self._batch, self._waiting = Batch(tokenizer.joining), []  # type: ignore[var-annotated]
        self._num_sequences = self.num_records = 0

    def add(self, head: dict[str, Any], documents: dict[str, Document], records: Any, left_out: Any) -> None:
        for document in documents.values():
            self._batch.add(document.pieces)
        self._waiting.append((head, list(documents)))
        if self._batch.num_characters >= ENCODE_CHARACTERS:
            self.flush(records, left_out)

    def flush(self, records: Any, left_out: Any) -> None:
        if not self._waiting:
            return
        tokens, flags, lengths = self._batch.encode(self._tokenizer.engine)
        # A control token ends an answer in one format and not in the other: the response is its text.
        flags[np.isin(tokens, self._control)] &= ~np.uint8(TARGET)
        ends = np.cumsum(lengths)
        row = 0
        for head, names in self._waiting:
            parts = [slice(ends[i] - lengths[i], ends[i]) for i in range(row, row + len(names))]
            row += len(names)
            longest = max(part.stop - part.start for part in parts)
            bad = None
            if longest > self._max_tokens:
                bad = BadRecord("too long", f"{longest} tokens; seq_length is {self._max_tokens}")
            elif any(not (_response(flags[part], head) & TARGET).any() for part in parts):
                bad = BadRecord("no tokens", "the tokenizer leaves nothing of the response")
            if bad is not None:
                shown = {key: value for key, value in head.items() if key != "record"}
                left_out.write(json.dumps({**shown, "reason": bad.reason, "detail": bad.detail}) + "\n")
                continue
            scored = [(name, part) for name, part in zip(names, parts) if name != REJECTED_CHAT]
            for _, part in scored:
                self._tokens.add(tokens[part])
                self._flags.add(_response(flags[part], head))
            sequences = {name: self._num_sequences + i for i, (name, _) in enumerate(scored)}
            records.write(json.dumps({**head, "sequences": sequences}, default=str) + "\n")
            self._num_sequences += len(scored)
            self.num_records += 1
        self._batch, self._waiting = Batch(self._tokenizer.joining), []

    def finish(self) -> None:
        self._tokens.finish()
        self._flags.finish()
