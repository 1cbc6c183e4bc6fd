"""A cache job as the tests run it: in this process, with shards so small that there are several."""

import json

import numpy as np
import pytest

from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.teacher import cache_fill, cache_format
from megatron_mixcpt.train.cache_teacher import cache_teacher

VOCABULARY = 250
SMALL_SHARDS = 5  # sequences


def fill(values, *, top_k=VOCABULARY, bits=32, steps=None):
    """Write the cache of a configuration."""
    config = validate(Config, values, "test")
    dtype = cache_format.record_dtype(32, top_k, VOCABULARY, bits)
    with StopRequest() as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_fill, "SHARD_BYTES", SMALL_SHARDS * dtype.itemsize)
        cache_teacher(config, stop, top_k=top_k, bits=bits, steps=steps)


def records(cache):
    """Everything kept, by name of the column, in the order of the shards."""
    manifest = json.loads((cache / "cache.json").read_text())
    identity = manifest["identity"]
    dtype = cache_format.record_dtype(
        identity["seq_length"], identity["top_k"], identity["vocab_size"], identity["bits"]
    )
    parts = [np.fromfile(shard.path(cache), dtype) for shard in cache_format.shards_of(identity)]
    return np.concatenate(parts)
