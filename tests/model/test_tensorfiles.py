"""Streamed safetensors against the safetensors package's own reader and writer."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.huggingface.tensorfiles import SafetensorsSource, SafetensorsWriter

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def draw(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}


@settings(deadline=None)
@given(SHAPES, DTYPES, st.integers(1, 2000))
def test_what_is_written_the_package_reads(shapes, dtype, shard_bytes):
    tensors = draw(shapes, dtype)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with SafetensorsWriter(
            folder, {k: tuple(t.shape) for k, t in tensors.items()}, dtype, "model", shard_bytes
        ) as out:
            for key, tensor in tensors.items():
                out.write(key, tensor)
        found = {}
        files = sorted(folder.glob("*.safetensors"))
        for path in files:
            part = load_file(path)
            assert len(part) == 1 or sum(sizes[key] for key in part) <= shard_bytes
            found |= {key: (path.name, tensor) for key, tensor in part.items()}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[key]) for key, (_, tensor) in found.items())
        index = folder / "model.safetensors.index.json"
        assert index.exists() == (len(files) > 1)
        if index.exists():
            content = json.loads(index.read_text())
            assert content["weight_map"] == {key: file for key, (file, _) in found.items()}
            assert content["metadata"]["total_size"] == sum(sizes.values())


@settings(deadline=None)
@given(SHAPES, DTYPES)
def test_what_the_package_writes_is_read(shapes, dtype):
    tensors = draw(shapes, dtype)
    with tempfile.TemporaryDirectory() as name:
        save_file(tensors, Path(name) / "model.safetensors", metadata={"format": "pt"})
        source = SafetensorsSource(Path(name))
        assert source.names() == tensors.keys()
        for key, tensor in tensors.items():
            assert (source.shape(key), source.dtype(key)) == (tuple(tensor.shape), dtype)
            for place in (torch.empty_like(tensor), torch.empty(tensor.shape, dtype=torch.float64)):
                source.read_into(key, place)
                assert torch.equal(place, tensor.to(place.dtype))
            strided = torch.empty(tensor.numel(), 2, dtype=dtype)[:, 0].view(tensor.shape)
            source.read_into(key, strided)
            assert torch.equal(strided, tensor)


def test_a_writer_takes_what_was_announced_and_all_of_it(tmp_path):
    shapes = {"a": (2,), "b": (3,)}
    with pytest.raises(ValueError, match="expected a"), SafetensorsWriter(tmp_path, shapes, torch.float32) as out:
        out.write("b", torch.ones(3))
    with (
        pytest.raises(ValueError, match=r"expected a \(2,\)"),
        SafetensorsWriter(tmp_path, shapes, torch.float32) as out,
    ):
        out.write("a", torch.ones(3))
    with (
        pytest.raises(ValueError, match="1 tensors were not"),
        SafetensorsWriter(tmp_path, shapes, torch.float32) as out,
    ):
        out.write("a", torch.ones(2))
    with pytest.raises(ConfigError, match="float64"):
        SafetensorsWriter(tmp_path, shapes, torch.float64)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    source = SafetensorsSource(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(VerificationError, match="truncated"):
        source.read_into("a", torch.empty(100))


def test_an_index_that_names_what_no_shard_holds_is_told(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(VerificationError, match="no shard holds b"):
        SafetensorsSource(tmp_path)
