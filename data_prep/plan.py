"""The frozen chunk plan: which bytes of which files make up each unit of work.

A plan depends on the inputs and on nothing else (not on the number of workers), so that every run, shard and resumed
run cuts the same chunks. Its key is a hash over the content of the inputs, the keys that shape the tokens, and the
tokenizer: anything that could change a token changes the key, and old parts are never taken for new ones.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megatron_mixcpt.data_prep.config import PreprocessConfig, SourceConfig
from megatron_mixcpt.data_prep.inputs import JSON_LINES, PARQUET, TEXT, file_format, resolve_paths
from megatron_mixcpt.data_prep.neardup import algorithm as neardup_algorithm
from megatron_mixcpt.data_prep.streams import compression
from megatron_mixcpt.errors import ConfigError

PLAN_VERSION = 2  # raise it when the meaning of parts changes
CHUNK_BYTES = 4 << 20
MAX_CHUNKS = 8192  # of a source; larger corpora get larger chunks, so that all parts can be mapped at once


@dataclass(frozen=True)
class InputFile:
    """An input file as it was when planned. `hash`: xxh3-128 of its bytes."""

    path: str
    format: str
    compression: str | None
    size: int
    mtime_ns: int
    hash: str
    heldout: bool = False


@dataclass(frozen=True)
class Span:
    """A piece of a file: bytes [begin, end), or row groups for parquet; `line` is the number of its first record."""

    file: int
    begin: int
    end: int
    line: int


@dataclass(frozen=True)
class Plan:
    """The work of one source: `chunks[i]` are the spans of chunk i."""

    source: str
    key: str
    files: list[InputFile]
    chunks: list[list[Span]]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def chunk_bytes(self, chunk: int) -> int:
        """Input bytes of a chunk (for progress)."""
        return sum(_num_bytes(span, self.files[span.file], self._spans) for span in self.chunks[chunk])

    @cached_property
    def _spans(self) -> Counter[int]:
        return Counter(span.file for chunk in self.chunks for span in chunk)


def _num_bytes(span: Span, file: InputFile, spans: Counter[int]) -> int:
    """Of a span; of the row groups of a file, which has `spans` of them, all alike."""
    return span.end - span.begin if _is_byte_range(file) else file.size // spans[span.file]


def _is_byte_range(file: InputFile) -> bool:
    return file.format in (JSON_LINES, TEXT) and not file.compression


def make_plan(
    source: SourceConfig,
    config: PreprocessConfig,
    tokenizer_hash: str,
    *,
    add_bos: bool,
    eos_id: int,
    evaluation: list[Any] | None,
) -> Plan:
    """Scan the inputs of `source` once (hash, newlines) and cut them. Raises ConfigError for unusable inputs.

    `evaluation` is decontaminate.evaluation_key, so that other evaluation files lead to other parts.
    """
    heldout = resolve_paths(source.heldout, source.name)
    train = resolve_paths(source.paths, source.name)
    if both := sorted(set(train) & set(heldout)):
        raise ConfigError(
            f"source {source.name}: {both[0]} is in paths and in heldout; what is trained on measures nothing"
        )
    paths = [*train, *heldout]
    total = sum(path.stat().st_size for path in paths)
    target = max(CHUNK_BYTES, -(-total // MAX_CHUNKS))
    files: list[InputFile] = []
    spans: list[Span] = []
    for index, path in enumerate(paths):
        file, cuts = scan_file(path, index, target, text_allowed=source.is_text)
        files.append(dataclasses.replace(file, heldout=index >= len(train)))
        spans.extend(cuts)
    # What shapes the tokens of a document, and nothing that only shapes the mixture.
    shaping: dict[str, Any] = source.model_dump(
        include={"kind", "text", "prompt", "response", "chosen", "rejected", "messages", "tools"}
        | {"format", "separator", "loss"}
    )
    shaping["near_duplicates"] = config.near_duplicates and [
        neardup_algorithm(),
        config.near_duplicates.ngram,
        config.near_duplicates.permutations,
    ]
    shaping["decontaminate"] = evaluation
    shaping["max_tokens"] = None if source.is_text else config.seq_length
    if source.too_long == "truncate":
        shaping["too_long"] = source.too_long
    key = xxhash.xxh3_128_hexdigest(
        orjson.dumps(
            [PLAN_VERSION, shaping, tokenizer_hash, add_bos, eos_id, config.max_record_bytes]
            + [[file.path, file.format, file.size, file.hash] for file in files]
        )
    )
    return Plan(source.name, key, files, _group(spans, files, target))


def scan_file(path: Path, index: int, target: int, *, text_allowed: bool) -> tuple[InputFile, list[Span]]:
    """Hash a file and cut it into spans of about `target` bytes, text of CHUNK_BYTES; plain text only where
    `text_allowed` is set."""
    form = file_format(path)
    assert form is not None
    if form == TEXT and not text_allowed:
        raise ConfigError(f"{path} is plain text; only domain and general sources can use it, others need keys")
    packed = compression(path) if form in (JSON_LINES, TEXT) else None
    stat = path.stat()
    cut = form in (JSON_LINES, TEXT) and packed is None
    state = xxhash.xxh3_128()
    spans: list[Span] = []
    begin, line, position = 0, 1, 0
    if form == TEXT:
        target = CHUNK_BYTES  # whatever the size of the corpus: a part of a text is a record
    with open(path, "rb") as stream:
        while block := stream.read(target):
            if position == 0:
                _refuse_utf16(block, path)
            state.update(block)
            end = position + block.rfind(b"\n") + 1
            if cut and end > position:
                spans.append(Span(index, begin, end, line))
                line, begin = line + block.count(b"\n"), end
            position += len(block)
    if cut and position > begin:
        spans.append(Span(index, begin, position, line))
    if form == PARQUET:
        spans = _row_groups(path, index)
    elif not cut:
        spans = [Span(index, 0, stat.st_size, 1)] if stat.st_size else []
    return InputFile(str(path), form, packed, stat.st_size, stat.st_mtime_ns, state.hexdigest()), spans


def _refuse_utf16(block: bytes, path: Path) -> None:
    if block[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ConfigError(f"{path} is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {path.name}")


def _row_groups(path: Path, index: int) -> list[Span]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            spans, row = [], 1
            for group in range(table.num_row_groups):
                spans.append(Span(index, group, group + 1, row))
                row += table.metadata.row_group(group).num_rows
            return spans
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not a parquet file: {error}") from None


def _group(spans: list[Span], files: list[InputFile], target: int) -> list[list[Span]]:
    """Small spans share a chunk: a folder of a million short files must not become a million parts."""
    chunks: list[list[Span]] = []
    room = 0
    of_files = Counter(span.file for span in spans)
    for span in spans:
        size = _num_bytes(span, files[span.file], of_files)
        if size > room or not chunks:
            chunks.append([])
            room = target
        chunks[-1].append(span)
        room -= size
    return chunks


def plan_to_json(plan: Plan) -> bytes:
    """The plan as it is kept beside its parts."""
    return orjson.dumps(dataclasses.asdict(plan), option=orjson.OPT_INDENT_2)
