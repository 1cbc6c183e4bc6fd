"""How long the documents of a mixture are, from a sample of its flags: what attention costs depends on it."""

from __future__ import annotations

import numpy as np

from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.format import DOC_START, open_indexed

SAMPLES = 64  # sequences of each source


def document_lengths(mix: Mix) -> dict[int, float]:
    """Lengths of documents, as far as they lie in one row, each with the share of all tokens that are in such."""
    shares: dict[int, float] = {}
    for source, share in zip(mix.train_sources, mix.sample_shares()):
        assert source.train is not None
        flags = open_indexed(flags_prefix(source.train.prefix))
        chosen = np.unique(np.linspace(0, len(flags) - 1, SAMPLES).astype(np.int64))
        found = np.concatenate([_documents(flags[number]) for number in chosen.tolist()])
        for length, count in zip(*np.unique(found, return_counts=True)):
            shares[int(length)] = shares.get(int(length), 0.0) + share * float(length * count / found.sum())
    return shares


def _documents(flags: np.ndarray) -> np.ndarray:
    """Lengths of the documents of one sequence, int `[documents]`."""
    starts = (np.asarray(flags) & DOC_START).astype(bool).nonzero()[0]
    return np.diff(np.unique(np.concatenate([[0], starts, [len(flags)]])))
