"""The .bin/.idx files: golden bytes against megatron-core's builder, and damage that must be noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixcpt.data_prep.format import IndexedWriter, open_indexed, token_dtype, write_index
from megatron_mixcpt.errors import MixcptError, VerificationError

DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [[7]], [[], [8, 9]]]


def write(prefix, documents, dtype):
    ends = [0]
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add(np.array(sequence, dtype=dtype))
            ends.append(ends[-1] + len(document))
        writer.finish(np.array(ends))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_bytes_equal_those_of_megatrons_builder(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 50), max_size=30), seed=st.integers(0, 99))
def test_what_is_written_is_read_back(tmp_path_factory, lengths, seed):
    prefix = tmp_path_factory.mktemp("roundtrip") / "p"
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 65000, size=n).astype(np.uint16) for n in lengths]
    with IndexedWriter(prefix, np.uint16) as writer:
        if sequences:
            writer.add(np.concatenate(sequences), np.array(lengths))
        writer.finish()
    found = open_indexed(prefix)
    assert len(found) == len(sequences)
    for ours, theirs in zip(sequences, found):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size, dtype", [(65499, "uint16"), (65500, "int32"), (65536, "int32"), (65537, "int32")])
def test_token_dtype_is_megatrons_choice(size, dtype):
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(size) == np.dtype(dtype) == np.dtype(DType.optimal_dtype(size))


def test_offsets_beyond_two_gigabytes_do_not_overflow(tmp_path):
    lengths = np.full(5, 2**30, dtype=np.int32)
    write_index(tmp_path / "p.idx", np.dtype(np.int32), lengths)
    raw = (tmp_path / "p.idx").read_bytes()
    pointers = np.frombuffer(raw, dtype="<i8", count=5, offset=34 + 4 * 5)
    assert pointers.tolist() == [i * 2**32 for i in range(5)]


def test_damage_is_noticed_when_opening(tmp_path):
    prefix = tmp_path / "p"
    write(prefix, DOCUMENTS, np.uint16)
    index, data = (tmp_path / "p.idx").read_bytes(), (tmp_path / "p.bin").read_bytes()
    for bad_index in (index[:-1], index + b"\0", b"XX" + index[2:], index[:20]):
        (tmp_path / "p.idx").write_bytes(bad_index)
        with pytest.raises(VerificationError):
            open_indexed(prefix)
    (tmp_path / "p.idx").write_bytes(index)
    for bad_data in (data[:-1], data[:-2], data + b"\0"):
        (tmp_path / "p.bin").write_bytes(bad_data)
        with pytest.raises(VerificationError):
            open_indexed(prefix)
    with pytest.raises(MixcptError, match="does not exist"):
        open_indexed(tmp_path / "missing")


def test_an_unfinished_writer_leaves_no_file_behind(tmp_path):
    with pytest.raises(RuntimeError):
        with IndexedWriter(tmp_path / "p", np.uint16) as writer:
            writer.add(np.arange(3))
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
