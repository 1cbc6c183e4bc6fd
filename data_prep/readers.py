"""Records of one span of an input file, each with its place, so that every error can name file and line."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_mixcpt.data_prep import plan
from megatron_mixcpt.data_prep.inputs import ARROW, PARQUET, TEXT
from megatron_mixcpt.data_prep.plan import InputFile, Span
from megatron_mixcpt.data_prep.streams import UTF8_BOM, cut_at_lines, decompressed_blocks, raw_blocks, split_lines
from megatron_mixcpt.data_prep.template import BadRecord
from megatron_mixcpt.errors import MixcptError

Numbered = Iterator[tuple[int, dict[str, Any] | BadRecord]]  # 1-based line (or row) and what stands there


def read_span(file: InputFile, span: Span, max_record_bytes: int, keys: list[str] | None = None) -> Numbered:
    """Yield (line, record) or (line, BadRecord). Raises MixcptError if the file changed since it was planned.

    `keys`: what will be looked at; columns of parquet and arrow files that are not among them are not read.
    """
    path = Path(file.path)
    check_unchanged(file)
    if file.format == PARQUET:
        yield from _limited(_parquet_rows(path, span, keys), max_record_bytes)
    elif file.format == ARROW:
        yield from _limited(_arrow_rows(path, keys), max_record_bytes)
    elif file.compression:
        blocks = decompressed_blocks(path, file.compression)
        if file.format == TEXT:
            yield from _texts(blocks, max_record_bytes)
        else:
            yield from _json_lines(span, blocks, max_record_bytes)
    else:
        with open(path, "rb") as stream:
            blocks = raw_blocks(stream, span.begin, span.end)
            if file.format == TEXT:
                yield from _whole_text(span, blocks, max_record_bytes)
            else:
                yield from _json_lines(span, blocks, max_record_bytes)
    check_unchanged(file)


def check_unchanged(file: InputFile) -> None:
    """Raises MixcptError if the input file is not the one that was planned."""
    try:
        stat = Path(file.path).stat()
    except OSError as error:
        raise MixcptError(f"input file {file.path}: {error.strerror}; put it back and run again") from None
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        raise MixcptError(f"input file {file.path} changed during the run; run the same command again")


def _json_lines(span: Span, blocks: Iterable[bytes], max_record_bytes: int) -> Numbered:
    first = span.begin == 0
    for number, line in enumerate(split_lines(blocks, max_record_bytes), start=span.line):
        if isinstance(line, int):
            yield number, _too_large(line, max_record_bytes)
            continue
        if first:
            line, first = line.removeprefix(UTF8_BOM), False
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if line.strip():
                yield number, _json_error(line, error)
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            yield number, BadRecord("not an object", f"the line holds a {type(record).__name__}, not a {{...}} object")


def _json_error(line: bytes, error: orjson.JSONDecodeError) -> BadRecord:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as problem:
        return BadRecord("invalid UTF-8", f"byte {problem.start + 1} of the line is not UTF-8")
    return BadRecord("invalid JSON", str(error))


def _too_large(size: int, limit: int) -> BadRecord:
    return BadRecord("too large", f"{size} bytes; max_record_bytes is {limit}")


def _texts(blocks: Iterable[bytes], max_record_bytes: int) -> Numbered:
    """The parts of a compressed text, cut where `plan.scan_file` cuts one that is not."""
    begin, line = 0, 1
    for size, lines, part in cut_at_lines(blocks, plan.CHUNK_BYTES, max_record_bytes):
        span = Span(0, begin, begin + size, line)
        if part is None:
            yield line, _too_large(size, max_record_bytes)
        else:
            yield from _whole_text(span, [part], max_record_bytes)
        begin, line = begin + size, line + lines


def _whole_text(span: Span, blocks: Iterable[bytes], max_record_bytes: int) -> Numbered:
    parts, size = [], 0
    for block in blocks:
        size += len(block)
        if size <= max_record_bytes:
            parts.append(block)
    if size > max_record_bytes:
        yield span.line, _too_large(size, max_record_bytes)
        return
    data = b"".join(parts)
    if span.begin == 0:
        data = data.removeprefix(UTF8_BOM)
    try:
        yield span.line, {"text": data.decode("utf-8")}
    except UnicodeDecodeError as problem:
        yield span.line, BadRecord("invalid UTF-8", f"byte {span.begin + problem.start + 1} of the file is not UTF-8")


def _parquet_rows(path: Path, span: Span, keys: list[str] | None) -> Numbered:
    import pyarrow.parquet

    number = span.line
    # pre_buffer would hold a whole row group in memory.
    with _named(path), pyarrow.parquet.ParquetFile(path, pre_buffer=False) as table:
        for group in range(span.begin, span.end):
            groups = {"row_groups": [group], "columns": keys}
            for batch in table.iter_batches(batch_size=1024, use_threads=False, **groups):
                for record in batch.to_pylist():
                    yield number, record
                    number += 1


def _arrow_rows(path: Path, keys: list[str] | None) -> Numbered:
    import pyarrow

    number = 1
    with _named(path), pyarrow.memory_map(str(path)) as source:
        try:
            batches: Any = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        for batch in batches:
            if keys is not None:
                batch = batch.select([key for key in keys if key in batch.schema.names])
            for start in range(0, len(batch), 1024):
                for record in batch.slice(start, 1024).to_pylist():
                    yield number, record
                    number += 1


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What pyarrow says of a damaged file does not tell which one it is."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise MixcptError(f"{path} is damaged or no file of its kind ({str(error)[:200]}): fetch it again") from None


def _limited(rows: Numbered, max_record_bytes: int) -> Numbered:
    """Rows whose texts together are longer than any line may be are as bad as such a line."""
    for number, record in rows:
        size = 0 if isinstance(record, BadRecord) else sum(len(v) for v in record.values() if isinstance(v, str))
        yield number, _too_large(size, max_record_bytes) if size > max_record_bytes else record
