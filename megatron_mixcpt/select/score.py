"""Log-probabilities of the targets of many sequences under a frozen model, on any process grid.

Sequences are sorted by length and scored in rounds of equally shaped micro-batches, so that little is computed on
padding; attention stays plain causal, since padding on the right is seen by nobody.

Shapes: b micro-batch, s sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.data.batch import IGNORE_INDEX
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.format import TARGET, Indexed, open_indexed
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.objectives.answers import AnswerBatch, AnswerSums
from megatron_mixcpt.objectives.logprobs import TokenLogProbs
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.runtime.kept_parts import compute_parts
from megatron_mixcpt.runtime.parallel import ParallelState

MULTIPLE = 32  # lengths are padded to multiples of it
MICRO_BATCHES = 8  # of a round, on each data-parallel rank


@dataclass(frozen=True)
class Round:
    """What all ranks score together: sequences dealt out in micro-batches of one shape."""

    sequences: np.ndarray  # int64, at most MICRO_BATCHES x data-parallel size x rows
    rows: int
    length: int


def plan_rounds(lengths: np.ndarray, micro_batch_tokens: int, data_size: int, multiple: int = MULTIPLE) -> list[Round]:
    """Rounds over all sequences, longest first; `multiple` is one of the ranks that share a row."""
    order = np.argsort(-lengths, kind="stable")
    rounds, begin = [], 0
    while begin < len(order):
        length = -(-int(lengths[order[begin]]) // multiple) * multiple
        rows = max(1, micro_batch_tokens // length)
        # As many micro-batches as are needed: the last round must not consist of padding.
        size = rows * data_size * MICRO_BATCHES
        rounds.append(Round(order[begin : begin + size], rows, length))
        begin += size
    return rounds


@torch.no_grad()
def score_sequences(
    prefix: Path,
    stage: StageModel,
    state: ParallelState,
    *,
    vocab_size: int,
    micro_batch_tokens: int,
    folder: Path,
    fingerprint: str,
    done: Callable[[int, int, bool], None],
) -> np.ndarray:
    """Sum of the log-probabilities of the targets of every sequence, fp64 `[sequences]`, on every rank. Collective.

    Args:
        folder: where finished rounds are kept under `fingerprint` (of model and sequences).
        done: called with each finished round's tokens and sequences, and whether it was computed now.
    """
    tokens, flags = open_indexed(prefix), open_indexed(flags_prefix(prefix))
    multiple = math.lcm(MULTIPLE, state.tensor_size * state.context_size)
    rounds = plan_rounds(tokens.lengths.astype(np.int64), micro_batch_tokens, state.data_size, multiple)
    answers = AnswerSums(TokenLogProbs(state, stage.vocab_start, vocab_size))
    run = ForwardBackward(stage.eval(), answers, num_sources=1, contributes=False)
    contributes = state.speaks_for_replica

    def compute(number: int) -> np.ndarray:
        work = rounds[number]
        mine = _share(work, state)
        run([_batch(tokens, flags, part, work) for part in mine], forward_only=True)
        values = torch.zeros(len(work.sequences), dtype=torch.float64, device=state.device)
        if contributes:
            for index, part in enumerate(mine):
                first = (index * state.data_size + state.data_rank) * work.rows
                values[first : first + len(part)] = answers.found[index][: len(part)]
        torch.distributed.all_reduce(values)
        return values.cpu().numpy()

    def finished(number: int, computed: bool) -> None:
        chosen = rounds[number].sequences
        done(int(tokens.lengths[chosen].sum(dtype=np.int64)), len(chosen), computed)

    shape = f"{fingerprint} {state.data_size} {micro_batch_tokens} {multiple}"
    parts = compute_parts(folder, shape, len(rounds), compute, state, finished)
    scores = np.empty(len(tokens))
    for work, part in zip(rounds, parts):
        scores[work.sequences] = part
    return scores


def _share(work: Round, state: ParallelState) -> list[np.ndarray]:
    """The sequences of this rank's micro-batches; as many micro-batches on every rank."""
    stride = work.rows * state.data_size
    count = -(-len(work.sequences) // stride)
    starts = [(m * state.data_size + state.data_rank) * work.rows for m in range(count)]
    return [work.sequences[start : start + work.rows] for start in starts]


def _batch(tokens: Indexed, flags: Indexed, sequences: np.ndarray, work: Round) -> AnswerBatch:
    rows = np.zeros((work.rows, work.length), dtype=np.int64)
    labels = np.full((work.rows, work.length), IGNORE_INDEX, dtype=np.int64)
    for row, sequence in enumerate(sequences.tolist()):
        ids, marks = tokens[sequence].astype(np.int64), flags[sequence]
        rows[row, : len(ids)] = ids
        labels[row, : len(ids) - 1] = np.where(marks[1:] & TARGET, ids[1:], IGNORE_INDEX)
    place, row_of = np.nonzero(labels.T != IGNORE_INDEX)
    if len(place) == 0:  # every rank takes part in the loss, also with padding alone
        place, row_of = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    packing = Documents.whole(work.rows, work.length)
    return AnswerBatch(
        tokens=torch.from_numpy(rows),
        labels=torch.from_numpy(labels),
        kinds=torch.zeros(work.rows, work.length, dtype=torch.int64),
        position_ids=packing.position_ids(),
        packing=packing,
        source=torch.zeros(work.rows, dtype=torch.int64),
        targets=torch.from_numpy(place * work.rows + row_of),
        documents=torch.from_numpy(row_of),
        num_documents=work.rows,
    )
