"""Filling a teacher cache: the teacher's pass over the stored sequences of the training sources, on any grid.

The unit is a shard: data-parallel replicas compute different shards, and a shard that is complete on disk is never
computed again. Which sequences share a micro-batch follows from the shard alone, so an interrupted job goes on to the
same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.batch import Batch, collate
from megatron_mixcpt.data.dataset import Mixture, train_dataset
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError, MixcptError, StoppedError
from megatron_mixcpt.files import WriteError, write_json
from megatron_mixcpt.progress import Progress
from megatron_mixcpt.runtime.failures import tell_alone
from megatron_mixcpt.runtime.first_rank import on_first
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.teacher.cache_choice import chosen_counts, draws_identity, read_chosen, write_chosen
from megatron_mixcpt.teacher.cache_format import (
    FORMAT,
    MANIFEST,
    SHARD_BYTES,
    Shard,
    fill_record,
    is_written,
    read_manifest,
    record_dtype,
    shards_of,
    write_shard,
)
from megatron_mixcpt.teacher.identity import data_identity
from megatron_mixcpt.teacher.interface import DenseTarget, Teacher
from megatron_mixcpt.teacher.topk import sparsify


def new_identity(
    config: Config,
    arch: Architecture,
    mix: Mix,
    teacher: dict[str, Any],
    *,
    top_k: int,
    bits: int,
    steps: int | None = None,
) -> dict[str, Any]:
    """What a cache of this configuration will be; with `steps`, one of the sequences alone that so many steps draw.

    Raises ConfigError for a `top_k` beyond the vocabulary.
    """
    if not 1 <= top_k <= arch.vocab_size:
        raise ConfigError(f"--top-k {top_k}: between 1 and the vocabulary's {arch.vocab_size}")
    size = record_dtype(mix.seq_length, top_k, arch.vocab_size, bits).itemsize
    identity = data_identity(config, arch, mix)
    if steps is not None:
        identity["draws"] = draws_identity(config, mix, steps)
        for content, count in chosen_counts(mix, identity["draws"]).items():
            identity["sources"][content]["chosen"] = count
    return {
        **identity,
        "teacher": teacher,
        "top_k": top_k,
        "bits": bits,
        "sequences_per_shard": max(1, SHARD_BYTES // size),
    }


def cost(identity: dict[str, Any], smaller: dict[str, Any]) -> str:
    """In a line what a cache takes, and what one of the sequences that the run draws (`smaller`) would."""
    sequences, drawn = _sequences(identity), _sequences(smaller)
    text = (
        f"{sequences} training sequences of {identity['seq_length']} tokens once through the teacher, "
        f"{_size(identity) / 2**30:.3f} GiB on disk"
    )
    if drawn >= sequences:
        return text
    return f"{text}; this run draws {drawn} of them: --steps caches those alone, {_size(smaller) / 2**30:.3f} GiB"


def _sequences(identity: dict[str, Any]) -> int:
    return sum(shard.end - shard.begin for shard in shards_of(identity))


def _size(identity: dict[str, Any]) -> int:
    """Bytes of a complete cache."""
    dtype = record_dtype(identity["seq_length"], identity["top_k"], identity["vocab_size"], identity["bits"])
    return dtype.itemsize * _sequences(identity)


def check_space(cache: Path, identity: dict[str, Any]) -> None:
    """Raise ConfigError where the whole cache has no room on its disk; what is there already counts as room."""
    needed = _size(identity)
    there = sum(path.stat().st_size for path in cache.glob("*/*.bin"))
    folder = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        raise ConfigError(
            f"teacher.cache: {cache} will take {needed / 2**30:.2f} GiB, its disk has {free / 2**30:.2f} GiB left: "
            "free some space, set another directory, or lower --top-k"
        )


def claim_cache(cache: Path, identity: dict[str, Any]) -> None:
    """Begin a cache, or go on with one. Raises ConfigError where the directory holds something else."""
    if (cache / MANIFEST).exists():
        found = read_manifest(cache)["identity"]
        differing = sorted(key for key in identity.keys() | found.keys() if found.get(key) != identity.get(key))
        if differing:
            raise ConfigError(
                f"teacher.cache: {cache} holds a cache that differs in {', '.join(differing)}: set another directory "
                "or remove it"
            )
        return
    if cache.exists() and (not cache.is_dir() or any(cache.iterdir())):
        raise ConfigError(f"teacher.cache: {cache} exists and holds no cache: set another directory")
    cache.mkdir(parents=True, exist_ok=True)
    write_json(cache / MANIFEST, {"format": FORMAT, "identity": identity})


def missing_shards(cache: Path, identity: dict[str, Any], state: ParallelState) -> list[Shard]:
    """The shards that are not there byte for byte, the ranks sharing the reading. Collective."""
    shards = shards_of(identity)
    mine = [shard for shard in shards[state.rank :: state.world_size] if not is_written(cache, shard)]
    found: list[Any] = [None] * state.world_size
    torch.distributed.all_gather_object(found, mine)
    missing = {shard for part in found for shard in part}
    return [shard for shard in shards if shard in missing]


def fill_cache(
    cache: Path,
    identity: dict[str, Any],
    teacher: Teacher,
    mix: Mix,
    state: ParallelState,
    stop: StopRequest,
    *,
    micro_batch_size: int,
    vocab_start: int,
) -> None:
    """Compute all missing shards and complete `cache.json`. Collective.

    Args:
        teacher: answers with logits; `vocab_start` is the global id of this rank's first.

    Raises StoppedError where a signal asked to stop; what is complete is kept.
    """
    missing = missing_shards(cache, identity, state)
    dtype = record_dtype(mix.seq_length, identity["top_k"], identity["vocab_size"], identity["bits"])
    draws = identity.get("draws")
    dataset = train_dataset(mix, draws["seed"] if draws else 0, cache / "index")
    if draws:
        on_first("choose sequences", lambda: write_chosen(cache, mix, dataset, draws), state)
    chosen = {content: read_chosen(cache, identity, content) for content in identity["sources"]}
    mine = missing[state.data_rank :: state.data_size]
    # All ranks go the same number of rounds: a teacher may need every one of them at every pass.
    # In each of them a replica has a micro-batch for each of its ranks.
    width = state.tensor_size * state.pipeline_size
    rounds = _rounds(missing, state.data_size, micro_batch_size, width)
    work = _work(mine, dataset, mix, dtype, chosen, micro_batch_size, width)
    total = _sequences(identity)
    left = sum(shard.end - shard.begin for shard in missing)
    writes = state.is_last_stage and state.tensor_rank == 0
    with contextlib.ExitStack() as stack:
        shown = state.rank == 0 and bool(missing)
        progress = stack.enter_context(
            Progress("caching the teacher", total, "sequences", done=total - left, shown=shown)
        )
        stop.defer(state.device)
        for sequences in rounds:
            if stop.agreed(state.device):
                raise StoppedError("stopped as asked; complete shards are kept: run the same command to go on")
            batches, places = next(work)
            teacher.begin_step(batches)
            for index, (batch, place) in enumerate(zip(batches, places)):
                if state.is_last_stage:
                    _answer(teacher, index, batch.to(state.device), place, identity, state, vocab_start, keep=writes)
                if place is not None and place.done and writes:
                    _write(cache, place)
            progress.advance(sequences, tokens=sequences * mix.seq_length)
    torch.distributed.barrier()
    if state.rank == 0:
        _complete(cache, identity)
    torch.distributed.barrier()


class _Place:
    """Where a micro-batch's records go."""

    def __init__(self, shard: Shard, records: np.ndarray, begin: int, count: int) -> None:
        self.shard, self.records, self.begin, self.count = shard, records, begin, count

    @property
    def done(self) -> bool:
        return self.begin + self.count == len(self.records)


def _write(cache: Path, place: _Place) -> None:
    try:
        write_shard(cache, place.shard, place.records)
    except WriteError as error:  # this rank's alone
        raise tell_alone(MixcptError(f"teacher.cache: {error}; what is complete is kept")) from error


def _rounds(shards: list[Shard], replicas: int, size: int, width: int) -> Iterator[int]:
    """How many sequences all replicas compute in each round, until the last of them is through."""
    left = [_sizes(shards[replica::replicas], size) for replica in range(replicas)]
    while sequences := sum(sum(itertools.islice(sizes, width)) for sizes in left):
        yield sequences


def _sizes(shards: list[Shard], size: int) -> Iterator[int]:
    """Sequences of each micro-batch of a replica with these shards."""
    for shard in shards:
        for begin in range(shard.begin, shard.end, size):
            yield min(size, shard.end - begin)


def _work(
    shards: list[Shard],
    dataset: Mixture,
    mix: Mix,
    dtype: np.dtype,
    chosen: dict[str, np.ndarray | None],
    size: int,
    width: int,
) -> Iterator[tuple[list[Batch], list[_Place | None]]]:
    """`width` micro-batches at a time, without end: made-up ones, of no place, when nothing is left.

    `chosen`: see `read_chosen`.
    """
    contents = [source.train.content for source in mix.train_sources if source.train]

    def real() -> Iterator[tuple[Batch, _Place | None]]:
        for shard in shards:
            source = contents.index(shard.content)
            listed = chosen[shard.content]
            records = np.zeros(shard.end - shard.begin, dtype)
            for begin in range(shard.begin, shard.end, size):
                places = range(begin, min(begin + size, shard.end))
                numbers = places if listed is None else listed[places.start : places.stop]
                samples = [dataset.stored(source, int(number)) for number in numbers]
                samples += samples[-1:] * (size - len(samples))  # every micro-batch has the same shape
                yield collate(samples), _Place(shard, records, begin - shard.begin, len(places))

    remaining = real()
    spare = collate([dataset.stored(0, 0)] * size)
    while True:
        pairs = [next(remaining, (spare, None)) for _ in range(width)]
        yield [batch for batch, _ in pairs], [place for _, place in pairs]


def _answer(
    teacher: Teacher,
    index: int,
    batch: Batch,
    place: _Place | None,
    identity: dict[str, Any],
    state: ParallelState,
    vocab_start: int,
    *,
    keep: bool,
) -> None:
    """The teacher's answers to one micro-batch, into their records. Collective over the tensor-parallel group."""
    target = teacher.target(index, batch)
    assert isinstance(target, DenseTarget)
    logits = target.logits.transpose(0, 1)  # [b, s, v/tp]
    # The next token, whether it is trained on or not: other loss masks need no other cache.
    following = torch.cat([batch.tokens[:, 1:], batch.tokens[:, -1:]], 1)
    sparse = sparsify(
        logits.flatten(0, 1),
        following.flatten(),
        identity["top_k"],
        temperature=identity["temperature"],
        group=state.tensor_group if state.tensor_size > 1 else None,
        vocab_start=vocab_start,
        vocab_size=identity["vocab_size"],
    )
    if place is None or not keep:
        return
    columns = [column.view(*logits.shape[:2], -1).cpu().numpy() for column in sparse]
    for row in range(place.count):
        ids, logp, gold, tail = (column[row] for column in columns)
        record = place.records[place.begin + row : place.begin + row + 1]
        fill_record(record, ids, logp, gold[:, 0], tail[:, 0], batch.keys[row].content)


def _complete(cache: Path, identity: dict[str, Any]) -> None:
    shards = {}
    for shard in shards_of(identity):
        path = shard.path(cache)
        shards[str(path.relative_to(cache))] = json.loads(path.with_suffix(".json").read_text())
    write_json(cache / MANIFEST, {"format": FORMAT, "identity": identity, "shards": shards})
