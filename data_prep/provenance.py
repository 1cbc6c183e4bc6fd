"""Where every document came from and where it went: one parquet file a source.

Columns: file, line, offset (first token in the record; 0 unless a text was cut to hold out a part), hash (16 bytes),
kind, status, split, tokens, targets, contaminated, sequences and positions (where
each piece of the document lies in its split's prefix; two lists of one length), pair (its number in the pair prefix).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.assemble import Corpus, Placement
from megatron_mixcpt.data_prep.format import KIND_NAMES
from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.data_prep.selection import KEPT, STATUS_NAMES
from megatron_mixcpt.files import writing

FOLDER = "provenance"
ROWS = 1 << 18  # written at a time


def provenance_path(out: Path, source: str) -> Path:
    """The provenance file of a source."""
    return out / FOLDER / f"{source}.parquet"


def write_provenance(
    path: Path,
    plan: Plan,
    corpus: Corpus,
    status: np.ndarray,
    valid: np.ndarray,
    placements: Mapping[str, Placement | None],
    pairs: Mapping[str, np.ndarray],
) -> None:
    """Write the provenance of one source.

    Args:
        status, valid: uint8 and bool [D], what became of each document and whether it is for validation.
        placements: for 'train' and 'valid', where the pieces of documents lie.
        pairs: for 'train' and 'valid', the rows of the chosen documents in the order of the pair prefix.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = corpus.documents
    count, sequence, position = _places(len(documents), placements)
    ends = np.concatenate([[0], np.cumsum(count)])
    pair = np.full(len(documents), -1, dtype=np.int64)
    for rows in pairs.values():
        pair[rows] = pair[rows + 1] = np.arange(len(rows))
    hashes = np.stack([documents["hash_high"], documents["hash_low"]], axis=1).astype(">u8")
    names = _strings([file.path for file in plan.files])
    with writing(path) as file, ExitStack() as closing:
        writer = None
        for first in range(0, max(1, len(documents)), ROWS):
            part = slice(first, first + ROWS)
            rows = documents[part]
            lists = [_list_column(values, ends[first : first + len(rows) + 1]) for values in (sequence, position)]
            splits = _column(np.where(valid[part], 1, 0).astype(np.int8))
            columns: dict[str, Any] = {
                "file": pa.DictionaryArray.from_arrays(_column(rows["file"].astype(np.int32)), names),
                "line": _column(rows["line"]),
                "offset": _column(corpus.offset[part]),
                "hash": pa.Array.from_buffers(
                    pa.binary(16), len(rows), [None, pa.py_buffer(np.ascontiguousarray(hashes[part]).tobytes())]
                ),
                "kind": pa.DictionaryArray.from_arrays(_column(rows["kind"].astype(np.int8)), _strings(KIND_NAMES)),
                "status": pa.DictionaryArray.from_arrays(_column(status[part].astype(np.int8)), _strings(STATUS_NAMES)),
                "split": pa.DictionaryArray.from_arrays(splits, _strings(["train", "valid"])),
                "tokens": _column(rows["tokens"]),
                "targets": _column(rows["targets"]),
                "contaminated": _column(rows["contaminated"] != 0),
                "sequences": lists[0],
                "positions": lists[1],
                "pair": _column(pair[part], (pair[part] >= 0) & (status[part] == KEPT)),
            }
            table = pa.table(columns)
            writer = writer or closing.enter_context(pq.ParquetWriter(file, table.schema, compression="zstd"))
            writer.write_table(table)


def _places(
    num_documents: int, placements: Mapping[str, Placement | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of each document (int64 [D]), and their sequences and positions in the order of documents and offsets."""
    there = [placement for placement in placements.values() if placement is not None]
    empty = np.zeros(0, dtype=np.int64)
    document = np.concatenate([placement.document for placement in there] or [empty])
    offset = np.concatenate([placement.offset for placement in there] or [empty])
    order = np.lexsort((offset, document))
    sequence = np.concatenate([placement.sequence for placement in there] or [empty])[order]
    position = np.concatenate([placement.position for placement in there] or [empty])[order]
    return np.bincount(document, minlength=num_documents), sequence, position


def _list_column(values: np.ndarray, ends: np.ndarray) -> Any:
    import pyarrow as pa

    inside = values[ends[0] : ends[-1]]
    return pa.ListArray.from_arrays(_column((ends - ends[0]).astype(np.int32)), _column(inside))


# Arrow arrays from buffers: pa.array would first import pandas, which takes a third of a second.
def _column(values: np.ndarray, known: np.ndarray | None = None) -> Any:
    """The numbers or truth values of a column, null where not `known`."""
    import pyarrow as pa

    bits = values.dtype == np.bool_
    data = np.packbits(values, bitorder="little") if bits else np.ascontiguousarray(values)
    mask = None if known is None else pa.py_buffer(np.packbits(known, bitorder="little"))
    kind = pa.bool_() if bits else pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [mask, pa.py_buffer(data)])


def _strings(values: Sequence[str]) -> Any:
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))
