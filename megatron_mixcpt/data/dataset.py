"""Megatron's GPTDataset and BlendedDataset, with the flags sidecar replayed beside the tokens."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.data.mix import Split as MixSplit
from megatron_mixcpt.data_prep.format import DOC_START, PAD

# The blend draws whole samples, so a source can be asked for slightly more than its share; the margin is Megatron's.
OVERSAMPLE = 1.005


class TokenFlagsDataset(GPTDataset):
    """GPTDataset whose samples are `tokens` and `flags`, both `[seq_length + 1]`, read by one and the same query."""

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str | None, *args: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *args)
        # A shallow copy shares all indices; only the file behind them differs.
        self._flags_view = copy.copy(self)
        self._flags_view.dataset = IndexedDataset(f"{dataset_path}.flags", multimodal=False, mmap=True)
        self._flags_view._pad_token_id = PAD | DOC_START
        if not np.array_equal(self._flags_view.dataset.sequence_lengths, self.dataset.sequence_lengths):
            raise ValueError(f"{dataset_path}: tokens and flags disagree about the sequence lengths; preprocess again")

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Sample `idx`: `tokens` int64 and `flags` uint8, `[seq_length + 1]`; None is a sample of padding only."""
        tokens, _ = self._query_document_sample_shuffle_indices(0 if idx is None else idx)
        flags, _ = self._flags_view._query_document_sample_shuffle_indices(0 if idx is None else idx)
        if idx is None:
            flags = np.full_like(flags, PAD)
        tokens = np.where(flags & PAD, 0, tokens)  # Megatron's padding id is no row of the embedding
        return {"tokens": torch.from_numpy(tokens), "flags": torch.from_numpy(flags.astype(np.uint8))}


def train_dataset(mix: Mix, num_samples: int, seed: int, cache_dir: Path) -> BlendedDataset:
    """The blend of all sources' training splits by their weights, `num_samples` samples in a seeded order.

    Items: `dataset_id` (index into `mix.train_sources`), `tokens` and `flags` as in TokenFlagsDataset.
    """
    sources = mix.train_sources
    total = sum(source.weight for source in sources)
    weights = [source.weight / total for source in sources]
    config = _dataset_config(mix, seed, cache_dir)

    def build() -> BlendedDataset:
        datasets = [
            _dataset(source.train, math.ceil(num_samples * weight * OVERSAMPLE), Split.train, config)
            for source, weight in zip(sources, weights)
        ]
        return BlendedDataset(datasets, weights, num_samples, config)

    return _built_once(build)


def valid_datasets(mix: Mix, seed: int, cache_dir: Path) -> dict[str, TokenFlagsDataset]:
    """Each source's whole validation split, by source name; sources without one are left out."""
    config = _dataset_config(mix, seed, cache_dir)
    return _built_once(
        lambda: {
            source.name: _dataset(source.valid, None, Split.valid, config) for source in mix.sources if source.valid
        }
    )


def _dataset(
    split: MixSplit | None, num_samples: int | None, index: Split, config: GPTDatasetConfig
) -> TokenFlagsDataset:
    assert split is not None
    indexed = TokenFlagsDataset.build_low_level_dataset(str(split.prefix), config)
    indices = np.arange(TokenFlagsDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return TokenFlagsDataset(indexed, str(split.prefix), indices, num_samples, index, config)


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
