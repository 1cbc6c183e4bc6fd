"""Megatron's GPTDataset with the flags sidecar replayed beside the tokens, and the mixture of several.

Megatron's own BlendedDataset fixes, when it is built, how many samples will ever be drawn of each source; another
number of steps or another weight shuffles everything anew. Here a source is one epoch of GPTDataset, gone through again
and again in orders that follow from the epoch's number (see position.py).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexReader
from megatron.core.datasets.utils import Split

from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.data.mix import Split as MixSplit
from megatron_mixcpt.data.permutation import permuted
from megatron_mixcpt.data.position import Draw
from megatron_mixcpt.data_prep.format import DOC_START, PAD
from megatron_mixcpt.errors import ConfigError


class SampleKey(NamedTuple):
    """Which sequence a sample is, whatever the seed and the order in which samples are drawn."""

    source: int
    """Index into the mixture's training sources."""
    sequence: int
    """Number of the stored sequence in that source."""
    content: int
    """Hash (64 bits) of the tokens and of where documents begin: of all that a model's answers depend on."""


def sample_key(source: int, sequence: int, tokens: np.ndarray, flags: np.ndarray) -> SampleKey:
    """`tokens` int64 and `flags` uint8, `[seq_length + 1]`; the last of them is the next sequence's first."""
    content = xxhash.xxh3_64(tokens[:-1].tobytes())
    content.update((flags[:-1] & DOC_START).tobytes())
    return SampleKey(source, sequence, content.intdigest())


class TokenFlagsDataset(GPTDataset):
    """GPTDataset whose samples are `tokens` and `flags`, both `[seq_length + 1]`, read by one and the same query."""

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str | None, *args: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *args)
        # A shallow copy shares all indices; only the file behind them differs.
        self._flags_view = copy.copy(self)
        self._flags_view.dataset = IndexedDataset(f"{dataset_path}.flags", multimodal=False, mmap=True)
        self._flags_view._pad_token_id = PAD | DOC_START
        if not np.array_equal(self._flags_view.dataset.sequence_lengths, self.dataset.sequence_lengths):
            raise ConfigError(f"{dataset_path}: tokens and flags disagree about the sequence lengths; preprocess again")

    @property
    def flags(self) -> IndexedDataset:
        """The flags of the stored sequences."""
        return self._flags_view.dataset

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """Sample `idx`: `tokens` int64 and `flags` uint8, `[seq_length + 1]`; None is a sample of padding only.

        `sequence` is the number of the stored sequence that the sample begins with.
        """
        tokens, documents = self._query_document_sample_shuffle_indices(0 if idx is None else idx)
        flags, _ = self._flags_view._query_document_sample_shuffle_indices(0 if idx is None else idx)
        if idx is None:
            flags = np.full_like(flags, PAD)
        tokens = np.where(flags & PAD, 0, tokens)  # Megatron's padding id is no row of the embedding
        sample = {"tokens": torch.from_numpy(tokens), "flags": torch.from_numpy(flags.astype(np.uint8))}
        return sample | {"sequence": int(documents[0])}

    def sequence(self, idx: int) -> int:
        """`sequence` of sample `idx`, without reading it."""
        return int(self.document_index[self.sample_index[self.shuffle_index[idx]][0]])


class Mixture(torch.utils.data.Dataset):
    """All sources' training splits, indexed by Draw."""

    def __init__(self, names: list[str], datasets: Sequence[Any], seed: int) -> None:
        """`datasets`: of TokenFlagsDataset or of another with its items."""
        self.datasets, self.seed = datasets, seed
        self._keys = [f"{seed} {name}" for name in names]

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """`tokens` and `flags` as in TokenFlagsDataset, `source`, `digest`, a hash of the sample and its order, and
        `key`, which does not depend on the order."""
        sample = self.datasets[draw.source][self._index(draw)]
        # The last token is the next sequence's first, which nothing learns from.
        digest = xxhash.xxh3_64(sample["tokens"][:-1].numpy(), seed=draw.order)
        digest.update(sample["flags"][:-1].numpy())
        key = sample_key(draw.source, sample["sequence"], sample["tokens"].numpy(), sample["flags"].numpy())
        return {**sample, "source": draw.source, "digest": digest.intdigest(), "key": key}

    def sequence(self, draw: Draw) -> int:
        """Number of the stored sequence that the sample begins with; reads no tokens."""
        return self.datasets[draw.source].sequence(self._index(draw))

    def _index(self, draw: Draw) -> int:
        """Every epoch of a source has an order of its own."""
        size = len(self.datasets[draw.source])
        epoch, number = divmod(draw.number, size)
        order = xxhash.xxh3_64_intdigest(f"{self._keys[draw.source]} {epoch}".encode())
        return permuted(number, size, order)

    def stored(self, source: int, number: int) -> dict[str, Any]:
        """Stored sequence `number` of a source as a sample; nothing follows its last token."""
        dataset = self.datasets[source]
        tokens = np.append(dataset.dataset[number].astype(np.int64), 0)
        flags = np.append(dataset.flags[number].astype(np.uint8), np.uint8(PAD | DOC_START))
        tokens = np.where(flags & PAD, 0, tokens)
        sample = {"tokens": torch.from_numpy(tokens), "flags": torch.from_numpy(flags), "source": source}
        return sample | {"sequence": number, "key": sample_key(source, number, tokens, flags)}


def train_dataset(mix: Mix, seed: int, cache_dir: Path) -> Mixture:
    """All sources' training splits, in the order of `mix.train_sources`."""
    config = _dataset_config(mix, seed, cache_dir)
    sources = mix.train_sources
    return _built_once(lambda: Mixture([s.name for s in sources], [_dataset(s.train, config) for s in sources], seed))


def valid_datasets(mix: Mix, seed: int, cache_dir: Path) -> dict[str, TokenFlagsDataset]:
    """Each source's whole validation split, by source name; sources without one are left out."""
    config = _dataset_config(mix, seed, cache_dir)
    return _built_once(lambda: {source.name: _dataset(source.valid, config) for source in mix.sources if source.valid})


def check_files(mix: Mix) -> None:
    """Raise ConfigError where a file of tokens or flags is missing or truncated; reads the indices alone."""
    for source in mix.sources:
        for split in (source.train, source.valid):
            if split is not None:
                index = Path(f"{split.prefix}.idx")
                if not index.exists():
                    raise ConfigError(f"data.mix: {index} is missing: copy it again or preprocess again")
                _check_size(split.prefix, _IndexReader(str(index), multimodal=False))


def _dataset(split: MixSplit | None, config: GPTDatasetConfig) -> TokenFlagsDataset:
    assert split is not None
    indexed = TokenFlagsDataset.build_low_level_dataset(str(split.prefix), config)
    _check_size(split.prefix, indexed.index)
    indices = np.arange(TokenFlagsDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    # Split.valid: one whole epoch, the last partial sample included.
    return TokenFlagsDataset(indexed, str(split.prefix), indices, None, Split.valid, config)


def _check_size(prefix: Path, index: _IndexReader) -> None:
    """Megatron's reader does not compare a .bin with its .idx: a truncated one would end a run in the middle."""
    itemsize = np.dtype(index.dtype).itemsize
    ends = index.sequence_pointers + index.sequence_lengths.astype(np.int64) * itemsize  # a view repeats and leaves out
    size_of_tokens = int(ends.max(initial=0))
    for suffix, size in ((".bin", size_of_tokens), (".flags.bin", size_of_tokens // itemsize)):
        path = Path(f"{prefix}{suffix}")
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise ConfigError(
                f"data.mix: {prefix}{suffix} has {found} bytes, its index asks for {size}: it is truncated; "
                "copy it again or preprocess again"
            )


def _dataset_config(mix: Mix, seed: int, cache_dir: Path) -> GPTDatasetConfig:
    # The index cache's key holds the prefixes, which are content-hashed: a cache can not be stale.
    cache_dir.mkdir(parents=True, exist_ok=True)
    prefixes = [[str(s.prefix) for s in splits if s] for splits in zip(*((s.train, s.valid) for s in mix.sources))]
    return GPTDatasetConfig(
        random_seed=seed,
        blend_per_split=[(names, None) if names else None for names in (*prefixes, [])],
        sequence_length=mix.seq_length,
        path_to_cache=str(cache_dir),
        tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={"hash": mix.tokenizer_hash}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        drop_last_partial_validation_sequence=False,
    )


def _built_once(build: Any) -> Any:
    """Rank 0 builds and caches the indices, then the others load them."""
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    if torch.distributed.get_rank() == 0:
        built = build()
        torch.distributed.barrier()
        return built
    torch.distributed.barrier()
    return build()
