"""A cache job as the tests run it: in this process, with shards so small that there are several."""

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
