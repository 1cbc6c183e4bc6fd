"""Which documents are kept: length limits, decontamination, exact and near duplicates, over all sources together."""

import numpy as np

from megatron_mixcpt.data_prep.assemble import Corpus
from megatron_mixcpt.data_prep.config import PreprocessConfig, SourceConfig
from megatron_mixcpt.data_prep.format import KIND_REJECTED
from megatron_mixcpt.data_prep.holdout import in_held_out_files
from megatron_mixcpt.data_prep.neardup import near_duplicates
from megatron_mixcpt.data_prep.plan import Plan

KEPT, TOO_SHORT, TOO_LONG, CONTAMINATED, DUPLICATE, NEAR_DUPLICATE = range(6)
STATUS_NAMES = ("kept", "too short", "too long", "contaminated", "duplicate", "near-duplicate")


def select(config: PreprocessConfig, plans: list[Plan], corpora: list[Corpus]) -> list[np.ndarray]:
    """The status of every document: one uint8 [D] array for each source.

    Of equal or similar records the first stays, in the order of the sources, their files and lines; of equal ones the
    first of those that are held out, if any is. Both answers of a preference pair share one fate.
    """
    heads = [np.flatnonzero(corpus.documents["kind"] != KIND_REJECTED) for corpus in corpora]
    statuses = [_by_length(source, corpus, rows) for source, corpus, rows in zip(config.sources, corpora, heads)]
    if config.decontaminate is not None and config.decontaminate.action == "drop":
        for status, corpus, rows in zip(statuses, corpora, heads):
            status[(status == KEPT) & (corpus.documents["contaminated"][rows] != 0)] = CONTAMINATED
    _mark_duplicates(statuses, plans, corpora, heads, all_of_them=config.exact_duplicates == "drop")
    if config.near_duplicates is not None:
        _mark_near_duplicates(config.near_duplicates.threshold, statuses, corpora, heads)
    return [_for_all_documents(status, corpus, rows) for status, corpus, rows in zip(statuses, corpora, heads)]


def _by_length(source: SourceConfig, corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    status = np.full(len(rows), KEPT, dtype=np.uint8)
    tokens = corpus.documents["tokens"][rows]
    if source.kind == "preference":
        tokens = np.maximum(tokens, corpus.documents["tokens"][rows + 1])
    status[tokens < source.min_tokens] = TOO_SHORT
    if source.max_tokens is not None:
        status[tokens > source.max_tokens] = TOO_LONG
    return status


def _mark_duplicates(
    statuses: list[np.ndarray],
    plans: list[Plan],
    corpora: list[Corpus],
    heads: list[np.ndarray],
    *,
    all_of_them: bool,
) -> None:
    """`all_of_them`: else those alone that would train on what is held out."""
    status = np.concatenate(statuses)
    hashes = np.concatenate([corpus.documents[["hash_high", "hash_low"]][rows] for corpus, rows in zip(corpora, heads)])
    held_out = np.concatenate(
        [in_held_out_files(plan, corpus.documents[rows]) for plan, corpus, rows in zip(plans, corpora, heads)]
    )
    kept = np.flatnonzero(status == KEPT)
    order = kept[np.lexsort((kept, ~held_out[kept], hashes["hash_low"][kept], hashes["hash_high"][kept]))]
    repeated = np.concatenate([[False], hashes[order][1:] == hashes[order][:-1]]) if len(order) else np.zeros(0, bool)
    if not all_of_them:
        first = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(order))))  # of those that are equal
        repeated &= held_out[order][first] & ~held_out[order]
    status[order[repeated]] = DUPLICATE
    _give_back(status, statuses)


def _mark_near_duplicates(
    threshold: float, statuses: list[np.ndarray], corpora: list[Corpus], heads: list[np.ndarray]
) -> None:
    status = np.concatenate(statuses)
    signatures, chosen = [], []
    for corpus, rows, mine in zip(corpora, heads, statuses):
        kept = np.zeros(len(corpus.documents), dtype=bool)
        kept[rows[mine == KEPT]] = True
        first = 0
        for block in corpus.blocks:
            assert block.signatures is not None
            signatures.append(block.signatures)
            chosen.append(np.flatnonzero(kept[first : first + len(block.documents)]))
            first += len(block.documents)
    status[np.flatnonzero(status == KEPT)[near_duplicates(signatures, chosen, threshold)]] = NEAR_DUPLICATE
    _give_back(status, statuses)


def _give_back(status: np.ndarray, statuses: list[np.ndarray]) -> None:
    for mine, new in zip(statuses, np.split(status, np.cumsum([len(each) for each in statuses])[:-1])):
        mine[:] = new


def _for_all_documents(status: np.ndarray, corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """From records to documents: a rejected answer follows its chosen one."""
    return np.repeat(status, np.diff([*rows, len(corpus.documents)])) if len(rows) else np.zeros(0, np.uint8)
