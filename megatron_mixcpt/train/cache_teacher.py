"""`mixcpt cache-teacher`: build the teacher alone, fill the cache, say what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.failures import explained
from megatron_mixcpt.runtime.first_rank import from_first
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.teacher.build import build_hf_teacher
from megatron_mixcpt.teacher.cache_fill import claim_cache, fill_cache, new_identity
from megatron_mixcpt.teacher.cache_format import read_manifest, record_dtype, shards_of
from megatron_mixcpt.teacher.identity import teacher_identity
from megatron_mixcpt.teacher.initial import InitialTeacher
from megatron_mixcpt.teacher.interface import Teacher
from megatron_mixcpt.train.setup import build_stage, read_model_and_mix


def cache_teacher(config: Config, stop: StopRequest, *, top_k: int, bits: int, steps: int | None = None) -> None:
    """Fill `config.teacher.cache`, or what of it is missing; with `steps`, for what so many steps draw alone.

    Raises ConfigError where the directory holds something else, StoppedError (75) when stopped.
    """
    assert config.teacher.cache is not None
    cache, grid = Path(config.teacher.cache), config.parallel
    if grid.context > 1:
        raise ConfigError(
            f"parallel.context {grid.context}: `mixcpt cache-teacher` keeps the answers of whole rows: set it to 1, "
            "the run that reads the cache may have any"
        )
    with explained(stop), parallel_context(**grid.sizes, seed=config.train.seed) as state:
        arch, mix = read_model_and_mix(config)
        teacher: Teacher
        if config.teacher.hf is not None:
            teacher = build_hf_teacher(config, state, arch)
            start, vocab_start = None, arch.padded_vocab_size(grid.tensor) // grid.tensor * state.tensor_rank
        else:
            stage = build_stage(config, arch)
            start, vocab_start = stage.start.weights, stage.model.vocab_start
            teacher = InitialTeacher(stage.model, pipelined=state.pipeline_size > 1)
        teacher_is = teacher_identity(config, start)
        identity = new_identity(config, arch, mix, teacher_is, top_k=top_k, bits=bits, steps=steps)
        from_first(lambda: claim_cache(cache, identity))
        size = config.train.micro_batch_size
        fill_cache(cache, identity, teacher, mix, state, stop, micro_batch_size=size, vocab_start=vocab_start)
        if state.rank == 0:
            _report(cache, identity, mix.seq_length)


def _report(cache: Path, identity: dict[str, Any], seq_length: int) -> None:
    shards = shards_of(identity)
    known = read_manifest(cache)["shards"]
    counts = {str(shard.path(cache).relative_to(cache)): shard.end - shard.begin for shard in shards}
    size = record_dtype(seq_length, identity["top_k"], identity["vocab_size"], identity["bits"]).itemsize
    sequences = sum(counts.values())
    tail = sum(known[name]["tail"] * count for name, count in counts.items()) / sequences
    print(
        f"{cache}: complete, {sequences} sequences of {seq_length} tokens in {len(shards)} shards, "
        f"{sequences * size / 2**30:.3f} GiB, {size / seq_length:.1f} bytes a token "
        f"({identity['top_k']} tokens kept, {identity['bits']} bits); "
        f"the tail holds {tail:.2%} of the teacher's probability"
    )
