"""Taking records of a result back to their source: read the line again, tokenize it again, compare."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep import plan
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.config import PreprocessConfig
from megatron_mixcpt.data_prep.documents import Batch, Document
from megatron_mixcpt.data_prep.findings import Findings
from megatron_mixcpt.data_prep.format import DOC_START, KIND_NAMES, TARGET, open_indexed
from megatron_mixcpt.data_prep.manifest import Manifest
from megatron_mixcpt.data_prep.mix import SPLITS, Mix
from megatron_mixcpt.data_prep.plan import InputFile, Span, scan_file
from megatron_mixcpt.data_prep.provenance import provenance_path
from megatron_mixcpt.data_prep.readers import read_span
from megatron_mixcpt.data_prep.records import make_renderer
from megatron_mixcpt.data_prep.template import BadRecord
from megatron_mixcpt.data_prep.tokenizer import Tokenizer, load_tokenizer
from megatron_mixcpt.errors import MixcptError


def trace_sample(out: Path, mix: Mix, manifest: Manifest, sample: int, findings: Findings) -> None:
    """Compare `sample` documents, spread evenly over each source and over its files, with their source."""
    if manifest.config is None:
        findings.notes.append("a view has no source of its own: verify the mix it was made from")
        return
    config = manifest.config
    tokenizer = load_tokenizer(mix.tokenizer.path, eos_token=config.eos_token)
    if tokenizer.hash != mix.tokenizer.hash:
        findings.problems.append("the tokenizer beside mix.json is not the one the data was made with")
        return
    for number, source in enumerate(config.sources):
        rows = _sample_rows(provenance_path(out, source.name), -(-sample // len(config.sources)))
        files = {path for path in {row["file"] for row in rows} if not Path(path).is_file()}
        if files:
            findings.notes.append(
                f"source {source.name}: {len(files)} input files are not here; its records are not traced"
            )
            continue
        try:
            _trace_source(mix, config, number, tokenizer, rows, findings)
        except MixcptError as error:
            findings.problems.append(f"source {source.name}: {error}")


def _sample_rows(path: Path, count: int) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    placed = table.filter(pc.greater(pc.list_value_length(table["sequences"]), 0))
    chosen = sorted({int(index) for index in np.linspace(0, len(placed) - 1, min(count, len(placed)))})
    return placed.take(pa.array(chosen, pa.int64())).to_pylist()


def _trace_source(
    mix: Mix,
    config: PreprocessConfig,
    number: int,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    findings: Findings,
) -> None:
    source, entry = config.sources[number], mix.sources[number]
    add_bos = tokenizer.adds_bos if config.add_bos is None else config.add_bos
    render = make_renderer(source, tokenizer, add_bos=add_bos)
    opened = {
        name: (open_indexed(split.prefix), open_indexed(flags_prefix(split.prefix)))
        for name, split in zip(SPLITS, (entry.train, entry.valid))
        if split is not None
    }
    for path in sorted({row["file"] for row in rows}):
        wanted: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            if row["file"] == path:
                wanted.setdefault(row["line"], []).append(row)
        file, spans = scan_file(Path(path), 0, plan.CHUNK_BYTES, text_allowed=True)
        for line, record in _lines(file, spans, set(wanted), config, source.keys):
            for row in wanted[line]:
                try:
                    if isinstance(record, BadRecord):
                        raise record
                    documents = render(record)
                except BadRecord as error:
                    findings.problems.append(f"{path}:{line}: is in the data, but cannot be read any more: {error}")
                    continue
                stored = _stored(row, *opened[row["split"]], mix.seq_length)
                problem = _difference(row, documents, tokenizer, stored, mix.seq_length)
                findings.num_records += 1
                if problem:
                    findings.problems.append(f"{path}:{line}: {problem}")


def _difference(
    row: dict[str, Any],
    documents: list[Document],
    tokenizer: Tokenizer,
    stored: tuple[np.ndarray, np.ndarray],
    seq_length: int,
) -> str | None:
    """How a document made again differs from its `stored` tokens and flags."""
    kind = KIND_NAMES.index(row["kind"])
    batch = Batch(tokenizer.joining)
    batch.add(next(each for each in documents if each.kind == kind).pieces)
    tokens, flags, _ = batch.encode(tokenizer.engine)
    stored_tokens, stored_flags = stored
    begin = row.get("offset") or 0  # older data has no such column
    if begin or row["tokens"] == seq_length:  # a piece of a text, or a conversation cut to fit
        tokens, flags = (values[begin : begin + row["tokens"]] for values in (tokens, flags))
    if not np.array_equal(tokens, stored_tokens):
        return "its tokens are not those in the data"
    starts = np.flatnonzero(stored_flags & DOC_START)  # every piece is a document start
    flags[starts] = (flags[starts] | DOC_START) & ~np.uint8(TARGET)
    return None if np.array_equal(flags, stored_flags) else "its flags are not those in the data"


def _lines(file: InputFile, spans: list[Span], wanted: set[int], config: PreprocessConfig, keys: list[str]) -> Any:
    """(line, record) for the wanted lines of a file, without reading spans that hold none of them."""
    ends = [span.line for span in spans[1:]] + [2**63]
    for span, end in zip(spans, ends):
        here = {line for line in wanted if span.line <= line < end}
        if here:
            for line, record in read_span(file, span, config.max_record_bytes, keys):
                if line in here:
                    yield line, record


def _stored(row: dict[str, Any], tokens: Any, flags: Any, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and flags of a document, put together from its pieces."""
    parts, left = [], row["tokens"]
    for sequence, position in zip(row["sequences"], row["positions"]):
        size = min(left, seq_length - position)
        parts.append((tokens[sequence][position : position + size], flags[sequence][position : position + size]))
        left -= size
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
