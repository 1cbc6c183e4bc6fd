"""Preference pairs as rows: chosen and rejected side by side, several pairs a row, none ever cut.

A row has twice `seq_length` tokens, so that any pair fits whose answers each fit `seq_length` (what does not is in the
quarantine of `mixcpt preprocess`). Within a row documents attend to themselves only, as everywhere.

Shapes: b rows of a micro-batch, r tokens of a row, n pairs and t answer tokens of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.batch import IGNORE_INDEX, collate
from megatron_mixcpt.data.mix import Mix, open_mix, reweighted
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.format import DOC_START, PAD, open_indexed
from megatron_mixcpt.data_prep.packing import best_fit
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.objectives.answers import AnswerBatch


@dataclass(kw_only=True)
class PairBatch(AnswerBatch):
    """A micro-batch of rows of pairs. Documents 2i and 2i + 1 are the chosen and the rejected answer of pair i."""

    rows: torch.Tensor  # [n] int64, row of each pair
    reference: torch.Tensor  # [n, 2] fp64, the starting weights' log-probabilities of the answers


class PairRows(Dataset):
    """The pairs of one prefix, packed into rows of `row_length` tokens.

    Args:
        reference: fp64 `[pairs, 2]`, or None before it is known (then zeros).
    """

    def __init__(self, prefix: Path, row_length: int, reference: np.ndarray | None = None) -> None:
        self.prefix, self.row_length = prefix, row_length
        self.row_of = pair_rows(prefix, row_length)
        self.num_rows = int(self.row_of.max()) + 1
        order = np.argsort(self.row_of, kind="stable")
        ends = np.cumsum(np.bincount(self.row_of))
        self.pairs_of = np.split(order, ends[:-1])
        self.reference = np.zeros((len(self.row_of), 2)) if reference is None else reference
        self._open()

    def _open(self) -> None:
        self._tokens, self._flags = open_indexed(self.prefix), open_indexed(flags_prefix(self.prefix))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tokens": None, "_flags": None}  # a mapped file would be copied to every data worker

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        """Row `index`: `tokens` int64 and `flags` uint8 `[row_length + 1]`, `reference` fp64 `[pairs, 2]`, and
        `sequence`, its number. None is a row of padding only.
        """
        tokens = np.zeros(self.row_length + 1, dtype=np.int64)
        flags = np.full(self.row_length + 1, PAD, dtype=np.uint8)
        pairs = np.zeros(0, dtype=np.int64) if index is None else self.pairs_of[index]
        position = 0
        for sequence in (side for pair in pairs.tolist() for side in (2 * pair, 2 * pair + 1)):
            size = len(self._tokens[sequence])
            tokens[position : position + size] = self._tokens[sequence]
            flags[position : position + size] = self._flags[sequence]
            position += size
        flags[position] |= DOC_START
        return {
            "tokens": torch.from_numpy(tokens),
            "flags": torch.from_numpy(flags),
            "reference": torch.from_numpy(self.reference[pairs]),
            "sequence": 0 if index is None else index,
        }


@lru_cache(maxsize=64)
def pair_rows(prefix: Path, row_length: int) -> np.ndarray:
    """Row of each pair of a prefix, int64 `[pairs]`. Raises ConfigError where one is longer than a row."""
    lengths = open_indexed(prefix).lengths.reshape(-1, 2).sum(1, dtype=np.int64)
    if lengths.max() > row_length:
        raise ConfigError(
            f"data.mix: {prefix} holds a pair of {lengths.max()} tokens, a row has {row_length}: preprocess again with "
            f"seq_length: {-(-int(lengths.max()) // 2)}"
        )
    return best_fit(lengths, row_length)[0]


def read_pair_mix(config: Config) -> Mix:
    """The preference pairs of `data.mix`: sources without pairs are left out. Raises ConfigError where there are none.

    The sequences of its splits are rows of twice `seq_length` tokens.
    """
    mix = open_mix(config.data.mix, config.data.seq_length)
    sources = []
    for source in mix.sources:
        train, valid = (
            split and dataclasses.replace(split, sequences=int(pair_rows(split.prefix, 2 * mix.seq_length).max()) + 1)
            for split in source.pairs
        )
        if train is not None or valid is not None:  # without the first it is only measured
            sources.append(dataclasses.replace(source, train=train, valid=valid))
    if not any(source.train for source in sources):
        raise ConfigError(
            f"data.mix: {mix.path} holds no preference pairs, which align.method dpo trains on: preprocess a source of "
            "kind preference"
        )
    return reweighted(dataclasses.replace(mix, sources=tuple(sources)), config.data.weights)


def collate_pairs(samples: list[dict]) -> PairBatch:
    """Stack items of PairRows into a PairBatch on the CPU."""
    batch = collate(samples)
    flags = torch.stack([sample["flags"] for sample in samples])
    counts = torch.tensor([len(sample["reference"]) for sample in samples])
    first = 2 * (counts.cumsum(0) - counts)  # [b] number of each row's first document
    document = (flags & DOC_START).bool().cumsum(1) - 1 + first.unsqueeze(1)  # [b, r + 1]
    labels, document = batch.labels.t().reshape(-1), document[:, 1:].t().reshape(-1)
    targets = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if len(targets) == 0:  # every rank takes part in the loss, also with padding alone
        targets = torch.zeros(1, dtype=torch.int64)
    return PairBatch(
        **{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)},
        targets=targets,
        documents=document[targets],
        num_documents=2 * int(counts.sum()),
        rows=torch.repeat_interleave(torch.arange(len(samples)), counts),
        reference=torch.cat([sample["reference"] for sample in samples]),
    )
