"""Every kind of input gives the same documents, and damaged ones are refused."""

import bz2
import gzip
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.data_prep import plan, streams
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.inputs import file_format, resolve_paths
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.streams import cut_at_lines, decompressed_blocks, split_lines
from megatron_mixcpt.data_prep.verify import verify
from megatron_mixcpt.errors import BadRecordsError, ConfigError, MixcptError
from tests.data_prep.conftest import sentences
from tests.data_prep.helpers import documents_of, load_mix, source_of

TEXTS = sentences(60, seed=5, words=(3, 60))
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def as_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=17)


def as_arrow_file(path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"text": TEXTS})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=13)


def as_dataset(path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))


def as_zstd(path: Path) -> None:
    import zstandard

    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(LINES[:1000]) + compress(LINES[1000:]))


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "crlf.jsonl": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "no_final_newline.jsonl": lambda path: path.write_bytes(LINES[:-1]),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "members.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(LINES[:1234]) + gzip.compress(LINES[1234:]) + bytes(512)
    ),
    "misnamed.jsonl": lambda path: path.write_bytes(gzip.compress(LINES)),
    "frames.jsonl.zst": as_zstd,
    "a.parquet": as_parquet,
    "a.arrow": as_arrow_file,
    "dataset": as_dataset,
    "texts": lambda path: [
        path.mkdir(exist_ok=True) or (path / f"{i:03d}.txt").write_text(text) for i, text in enumerate(TEXTS)
    ],
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_input_gives_the_same_documents(config_values, tmp_path, tokenizer_dir, monkeypatch, name):
    monkeypatch.setattr("megatron_mixcpt.data_prep.plan.CHUNK_BYTES", 2000)
    path = tmp_path / name
    WRITERS[name](path)
    config_values["sources"] = [{**config_values["sources"][0], "paths": [str(path)]}]
    config_values["valid_fraction"] = 0.0
    preprocess(parse_config(config_values))
    out = Path(config_values["out"])
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    want = []
    for text in TEXTS:
        ids = [*backend.encode(text).ids, 0]
        want += [tuple(ids[i : i + 128]) for i in range(0, len(ids), 128)]
    entry = source_of(load_mix(out), "docs")["train"]
    assert sorted(tuple(tokens.tolist()) for tokens, _ in documents_of(out, entry["prefix"])) == sorted(want)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_archive_is_an_error_and_not_a_short_corpus(config_values, tmp_path, suffix, damage):
    import zstandard

    data = (
        gzip.compress(LINES) if suffix == ".jsonl.gz" else zstandard.ZstdCompressor(write_checksum=True).compress(LINES)
    )
    middle = len(data) // 2
    bad = data[:-3] if damage == "truncated" else data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(bad)
    config_values["sources"] = [{**config_values["sources"][0], "paths": [str(path)]}]
    with pytest.raises(MixcptError, match=rf"bad{suffix} (is damaged|ends in the middle)"):
        preprocess(parse_config(config_values))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=20), st.integers(1, 25), st.integers(1, 40))
def test_lines_do_not_depend_on_how_the_bytes_arrive(pieces, limit, block):
    data = b"\n".join(piece.replace(b"\n", b"") for piece in pieces)
    whole = data.split(b"\n")
    if whole[-1] == b"":
        whole.pop()
    want = [line if len(line) <= limit else len(line) for line in whole]
    assert list(split_lines((data[i : i + block] for i in range(0, len(data), block)), limit)) == want


@pytest.mark.parametrize("size", [0, 1, 4096, 10_000, 65_536])
def test_gzip_output_is_complete_whatever_the_block_size(tmp_path, monkeypatch, size):
    path = tmp_path / "x.gz"
    data = bytes(i * 7 % 251 for i in range(size))
    path.write_bytes(gzip.compress(data) + gzip.compress(b"tail"))
    for read, block in ((1, 1), (7, 1000), (1 << 14, 4096), (1 << 14, 1)):
        monkeypatch.setattr(streams, "READ_BYTES", read)
        monkeypatch.setattr(streams, "BLOCK_BYTES", block)
        assert b"".join(decompressed_blocks(path, "gzip")) == data + b"tail"
        if size == 65_536:
            break


def test_a_huge_line_is_not_held_in_memory(config_values, corpus):
    corpus["domain"].write_bytes(b'{"text": "a"}\n{"text": "' + b"y" * 9_000_000 + b'"}\n{"text": "b"}\n')
    config_values.update(valid_fraction=0.0, max_record_bytes=1 << 20)
    config_values["sources"][0]["max_bad_fraction"] = 0.5
    preprocess(parse_config(config_values))
    out = Path(config_values["out"])
    (row,) = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert (row["line"], row["reason"]) == (2, "too large") and "9000012 bytes" in row["detail"]


def test_line_numbers_hold_across_chunks(config_values, corpus, monkeypatch):
    monkeypatch.setattr("megatron_mixcpt.data_prep.plan.CHUNK_BYTES", 3000)
    lines = corpus["domain"].read_bytes().splitlines()
    for number in (3, 150, 399):
        lines[number - 1] = b"broken"
    corpus["domain"].write_bytes(b"\n".join(lines))
    config_values["sources"][0]["max_bad_fraction"] = 0.1
    preprocess(parse_config(config_values))
    rows = [json.loads(line) for line in (Path(config_values["out"]) / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == [3, 150, 399]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_missing_column_is_quarantined_like_a_missing_key(config_values, tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    source = {**config_values["sources"][0], "paths": [str(path)], "text": "{title} {text}"}
    config_values["sources"] = [source]
    with pytest.raises(BadRecordsError, match=r"missing key.*no key 'title'; the record has: text"):
        preprocess(parse_config(config_values))


def test_directories_are_searched_but_not_their_hidden_parts(tmp_path):
    folder = tmp_path / ".cache" / "data"
    for name in ("a.jsonl", "deep/b.jsonl.gz", ".hidden/c.jsonl", "deep/.d.jsonl", "notes.pdf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    found = resolve_paths([str(folder), str(folder / "*.jsonl")], "s")
    assert [str(path.relative_to(folder)) for path in found] == ["a.jsonl", "deep/b.jsonl.gz"]


def test_a_dataset_with_splits_asks_for_one(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS[:3]})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ConfigError, match=r"d/train or .*d/test"):
        resolve_paths([str(tmp_path / "d")], "s")


def test_unusable_paths_are_explained(tmp_path, config_values):
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b"x"))
    with pytest.raises(ConfigError, match="unknown ending"):
        resolve_paths([str(tmp_path / "a.bz2")], "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no file with a known ending"):
        resolve_paths([str(tmp_path / "empty")], "s")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "README.md").write_text("about this dataset")
    (mixed / "a.jsonl").write_bytes(LINES)
    with pytest.raises(ConfigError, match=r"several kinds: text \(README.md\), json-lines \(a.jsonl\)"):
        resolve_paths([str(mixed)], "s")
    path = tmp_path / "wide.jsonl"
    path.write_text("{}", encoding="utf-16")
    config_values["sources"] = [{**config_values["sources"][0], "paths": [str(path)]}]
    with pytest.raises(ConfigError, match="UTF-16"):
        preprocess(parse_config(config_values))
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    config_values["sources"][0]["paths"] = [str(tmp_path / "x.parquet")]
    with pytest.raises(ConfigError, match="not a parquet file"):
        preprocess(parse_config(config_values))
    assert file_format("a.parquet.gz") is None and file_format("README") is None


@given(
    text=st.text(alphabet="ab\n é", max_size=300),
    target=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
)
def test_a_compressed_text_is_cut_where_the_text_itself_is(text, target, sizes):
    """However the decompressor hands it over."""
    data = text.encode()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "CHUNK_BYTES", target)
        path = Path(folder) / "a.txt"
        path.write_bytes(data)
        _, spans = plan.scan_file(path, 0, 10**9, text_allowed=True)
    blocks, position = [], 0
    for size in itertools.islice(itertools.cycle(sizes), len(data)):
        blocks.append(data[position : position + size])
        position += size
    parts = list(cut_at_lines(blocks, target, limit=100))
    assert [size for size, _, _ in parts] == [span.end - span.begin for span in spans]
    assert list(itertools.accumulate([1, *(lines for _, lines, _ in parts)]))[:-1] == [span.line for span in spans]
    for (size, _, part), span in zip(parts, spans):
        assert part == (data[span.begin : span.end] if size <= 100 else None)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_long_text_is_read_in_parts_whatever_the_size_of_the_corpus_and_verified(
    config_values, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(plan, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(plan, "MAX_CHUNKS", 1)  # as if there were 128 GiB of it
    data = "\n".join(TEXTS).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    config_values["sources"] = [{**config_values["sources"][0], "paths": [str(path)]}]
    config_values |= {"max_record_bytes": 6000, "valid_fraction": 0.0}
    preprocess(parse_config(config_values))
    out = Path(config_values["out"])
    assert (out / "quarantine.jsonl").read_text() == "" and verify(out, sample=100).problems == []
    assert len(list(documents_of(out, source_of(load_mix(out), "docs")["train"]["prefix"]))) > len(data) // 6000


def test_many_parts_keep_no_files_open(config_values, tmp_path):
    """A corpus of a few GiB has more parts than a process may have files open."""
    config_values["sources"] = config_values["sources"][:1]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_values))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from megatron_mixcpt.data_prep import plan; plan.CHUNK_BYTES = 500\n"
        "from megatron_mixcpt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "preprocess", str(tmp_path / "config.yaml"), "--workers", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((Path(config_values["out"]) / ".parts").glob("*/*.part"))) > 2 * 64


def test_small_row_groups_share_a_part(config_values, tmp_path):
    as_parquet(tmp_path / "a.parquet")  # 17 rows a group
    config_values["sources"] = [{**config_values["sources"][0], "paths": [str(tmp_path / "a.parquet")]}]
    preprocess(parse_config(config_values))
    assert len(list((Path(config_values["out"]) / ".parts").glob("*/*.part"))) == 1


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_table_is_named_and_a_row_may_be_as_long_as_a_line(config_values, tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    config_values["sources"] = [{**config_values["sources"][0], "paths": [str(path)], "max_bad_fraction": 1.0}]
    longest = sorted(len(text) for text in TEXTS)[-3]
    preprocess(parse_config(config_values | {"max_record_bytes": longest, "out": str(tmp_path / "limited")}))
    rows = (tmp_path / "limited" / "quarantine.jsonl").read_text().splitlines()
    assert len(rows) == 2 and all(json.loads(row)["reason"] == "too large" for row in rows)
    data = bytearray(path.read_bytes())
    if name == "a.parquet":
        data[100:200] = bytes(100)
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    with pytest.raises(MixcptError, match=re.escape(f"{path} is damaged or no file of its kind")):
        preprocess(parse_config(config_values))
    (tmp_path / "pointer.arrow").write_text("version https://git-lfs.github.com/spec/v1\n")
    config_values["sources"][0]["paths"] = [str(tmp_path / "pointer.arrow")]
    with pytest.raises(MixcptError, match=r"pointer.arrow is damaged or no file of its kind"):
        preprocess(parse_config(config_values))
