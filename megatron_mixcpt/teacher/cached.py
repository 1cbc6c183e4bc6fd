"""A teacher whose answers were computed beforehand (`mixcpt cache-teacher`): no second model, no second pass.

Shapes: s sequence, b micro-batch, k tokens kept.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.batch import Batch, of_part
from megatron_mixcpt.data.dataset import SampleKey
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError, MixcptError, VerificationError
from megatron_mixcpt.runtime.failures import tell_alone
from megatron_mixcpt.teacher.cache_choice import read_chosen, refuse_other_draws
from megatron_mixcpt.teacher.cache_format import (
    check_record,
    dequantized,
    read_manifest,
    record_dtype,
    shards_of,
)
from megatron_mixcpt.teacher.identity import data_identity, refuse_foreign
from megatron_mixcpt.teacher.interface import TopkTarget

READERS = 4


def open_cache(config: Config, arch: Architecture, mix: Mix) -> dict[str, Any]:
    """Identity of the configuration's cache, which is complete and belongs to its data; opens no weights.

    Raises ConfigError where it is missing, unfinished, truncated, or of other data.
    """
    assert config.teacher.cache is not None
    cache = Path(config.teacher.cache)
    manifest = read_manifest(cache)
    identity = manifest["identity"]
    refuse_foreign(cache, identity, data_identity(config, arch, mix))
    refuse_other_draws(cache, identity, config, mix)
    if "shards" not in manifest:
        raise ConfigError(f"teacher.cache: {cache} is not finished: run `mixcpt cache-teacher` again, it goes on")
    for shard in shards_of(identity):
        path = shard.path(cache)
        size = manifest["shards"][str(path.relative_to(cache))]["size"]
        if not path.is_file() or path.stat().st_size != size:
            raise ConfigError(
                f"teacher.cache: {path} is missing or truncated: run `mixcpt cache-teacher` again, which makes it anew"
            )
    return identity


class CachedTeacher:
    """Answers from a cache's files. Every record is compared with its hash, and with the sample that it is for.

    Args:
        cache: directory with an `identity` from `open_cache`.
        mix: whose training sources the samples are of.
        reads: whether this rank computes the loss (the last pipeline stage).
    """

    def __init__(self, cache: Path, identity: dict[str, Any], mix: Mix, *, reads: bool) -> None:
        self.cache, self._reads = cache, reads
        self.top_k: int = identity["top_k"]
        self._per_shard: int = identity["sequences_per_shard"]
        self._dtype = record_dtype(mix.seq_length, self.top_k, identity["vocab_size"], identity["bits"])
        self._contents = [source.train.content for source in mix.train_sources if source.train]
        self._chosen = [read_chosen(cache, identity, content) for content in self._contents]
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="teacher-cache")
        self._coming: list[Future[tuple[Tensor, ...]]] = []

    def begin_step(self, batches: list[Batch]) -> None:
        """Starts to read what all micro-batches of the step need, in the background."""
        if self._reads:
            self._coming = [self._pool.submit(self._read, batch.keys) for batch in batches if batch.keys]

    def target(self, index: int, batch: Batch) -> TopkTarget:
        device = batch.tokens.device
        if not batch.keys:  # the dry run's
            columns = tuple(column.to(device) for column in self._made_up(batch))
        else:
            try:
                whole = self._coming[index].result()
            except MixcptError as error:  # the peers read other records
                raise tell_alone(error) from None
            columns = tuple(of_part(column.to(device, non_blocking=True), batch) for column in whole)
        ids, logp, gold, tail = columns
        # Rounded probabilities do not sum to 1. The loss takes what is missing for the tail: this makes it the tail.
        inside = (ids == batch.labels.unsqueeze(-1)).any(-1)
        parts = torch.cat([logp, torch.stack([gold.masked_fill(inside, -torch.inf), tail], -1)], -1)
        total = parts.logsumexp(-1)  # [b, s]
        return TopkTarget(
            ids=ids.transpose(0, 1),
            logp=(logp - total.unsqueeze(-1)).transpose(0, 1),
            gold_logp=(gold - total).t(),
        )

    def _read(self, keys: tuple[SampleKey, ...]) -> tuple[Tensor, ...]:
        """ids `[b, s, k]` int32, logp `[b, s, k]`, gold and tail `[b, s]` fp32."""
        records = np.stack([self._record(key) for key in keys])
        numbers = (
            torch.from_numpy(dequantized(np.ascontiguousarray(records[name]))) for name in ("logp", "gold", "tail")
        )
        return torch.from_numpy(records["ids"].astype(np.int32)), *numbers

    def _record(self, key: SampleKey) -> np.ndarray:
        number, place = divmod(self._place(key), self._per_shard)
        path = self.cache / self._contents[key.source] / f"{number:06d}.bin"
        where = f"teacher.cache: {path}, record {place}"
        size = self._dtype.itemsize
        try:
            with path.open("rb") as file:
                file.seek(place * size)
                content = file.read(size)
        except OSError as error:
            raise VerificationError(f"{where}: cannot be read: {error}") from None
        if len(content) != size:
            raise VerificationError(f"{where}: the file is truncated; run `mixcpt cache-teacher` again")
        record = np.frombuffer(content, dtype=self._dtype)[0]
        check_record(record, key.content, where)
        return record

    def _place(self, key: SampleKey) -> int:
        """Among the records of its source."""
        chosen = self._chosen[key.source]
        if chosen is None:
            return key.sequence
        place = int(np.searchsorted(chosen, key.sequence))
        if place == len(chosen) or chosen[place] != key.sequence:
            raise VerificationError(
                f"teacher.cache: {self.cache} has no answer for sequence {key.sequence} of data "
                f"{self._contents[key.source]}: it was made with --steps, for fewer or other samples"
            )
        return place

    def _made_up(self, batch: Batch) -> tuple[Tensor, ...]:
        """Of the size of a real answer."""
        shape = (*batch.tokens.shape, self.top_k)
        uniform = torch.full(shape, -math.log(self.top_k + 2))
        ids = torch.arange(self.top_k, dtype=torch.int32).expand(shape)
        return ids, uniform, uniform[..., 0], uniform[..., 0]
