import threading

import pytest
import torch

from megatron_mixcpt.huggingface import stream
from megatron_mixcpt.huggingface.stream import read_ahead

SHAPES = {"a": (4, 4), "b": (2,), "c": (2,), "d": (3, 4), "e": (1,)}


def test_tensors_come_in_order_and_no_more_than_the_bound_is_read_ahead(monkeypatch):
    monkeypatch.setattr(stream, "AHEAD_NUMBERS", 6)
    read, release = [], threading.Semaphore(0)

    def tensor(name):
        read.append(name)
        release.release()
        return torch.zeros(SHAPES[name])

    ahead = {"a": "bc", "b": "c", "c": "d", "d": "e", "e": ""}  # d is larger than the bound: read when it is next
    done = ""
    for name, whole in read_ahead(SHAPES, tensor):
        assert whole.shape == SHAPES[name]
        done += name
        while len(read) < len(done) + len(ahead[name]):
            assert release.acquire(timeout=30)
        assert "".join(read) == done + ahead[name]
    assert done == "abcde"


def test_a_reader_that_fails_is_heard():
    def tensor(name):
        if name == "c":
            raise OSError("gone")
        return torch.zeros(SHAPES[name])

    seen = []
    with pytest.raises(OSError, match="gone"):
        for name, _ in read_ahead(SHAPES, tensor):
            seen.append(name)
    assert seen == ["a", "b"]
