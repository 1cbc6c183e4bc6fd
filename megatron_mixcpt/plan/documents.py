"""How long the documents of a mixture are, from a sample of its flags: what attention costs depends on it."""

from __future__ import annotations

import numpy as np

from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.format import DOC_START, open_indexed

SAMPLES = 64  # sequences of each source


def document_length(mix: Mix) -> float:
    """Length of the document that a token is in, as far as it lies in the token's row, on average over the tokens."""
    lengths = 0.0
    for source, share in zip(mix.train_sources, mix.sample_shares()):
        assert source.train is not None
        flags = open_indexed(flags_prefix(source.train.prefix))
        chosen = np.unique(np.linspace(0, len(flags) - 1, SAMPLES).astype(np.int64))
        found = [_documents(flags[number]) for number in chosen.tolist()]
        sizes = np.concatenate(found).astype(np.float64)
        lengths += share * float((sizes**2).sum() / sizes.sum())
    return lengths


def _documents(flags: np.ndarray) -> np.ndarray:
    """Lengths of the documents of one sequence, int `[documents]`."""
    starts = (np.asarray(flags) & DOC_START).astype(bool).nonzero()[0]
    return np.diff(np.unique(np.concatenate([[0], starts, [len(flags)]])))
