"""Log-probabilities of preference pairs under the starting weights: computed once, kept in the run directory.

They are computed in the very rows that training uses, so the loss of the first step is log 2 without label smoothing;
afterwards no reference model is held in memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.data.mix import Split
from megatron_mixcpt.model.stage import Stage, Start
from megatron_mixcpt.objectives.answers import AnswerSums
from megatron_mixcpt.objectives.logprobs import TokenLogProbs
from megatron_mixcpt.objectives.pairs import PairRows, collate_pairs
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.runtime.kept_parts import compute_parts
from megatron_mixcpt.runtime.parallel import ParallelState

FOLDER = "reference"
MICRO_BATCHES = 8  # a part, on each data-parallel rank
TELL_SECONDS = 5.0


@torch.no_grad()
def reference_log_probs(
    config: Config,
    name: str,
    split: Split,
    rows: PairRows,
    stage: Stage,
    state: ParallelState,
    log_probs: TokenLogProbs,
    heartbeat: Callable[[str], None],
) -> np.ndarray:
    """fp64 `[pairs, 2]`, the same on every rank. Collective; `stage` holds the starting weights.

    Kept in `run_dir/reference/<name>`, with a hash, under a fingerprint of the weights, the pairs and the precision.
    """
    answers = AnswerSums(log_probs)
    run = ForwardBackward(stage.model, answers, num_sources=1, contributes=False)
    contributes = state.speaks_for_replica
    size = config.train.micro_batch_size
    stride = size * state.data_size * MICRO_BATCHES
    began = told = time.monotonic()

    def compute(part: int) -> np.ndarray:
        mine = [
            [part * stride + (m * state.data_size + state.data_rank) * size + i for i in range(size)]
            for m in range(MICRO_BATCHES)
            if part * stride + m * state.data_size * size < len(rows)
        ]
        batches: list[Batch] = [
            collate_pairs([rows[i] if i < len(rows) else rows[None] for i in indices]) for indices in mine
        ]
        run(batches, forward_only=True)
        first = part * stride
        ends = np.cumsum([0, *(len(pairs) for pairs in rows.pairs_of[first : first + stride])])
        values = torch.zeros(int(ends[-1]), 2, dtype=torch.float64, device=state.device)
        if contributes:
            for number, indices in enumerate(mine):
                begin, end = (ends[min(i, len(rows)) - first] for i in (indices[0], indices[-1] + 1))
                values[begin:end] = answers.found[number].view(-1, 2)
        torch.distributed.all_reduce(values)
        return values.cpu().numpy()

    def done(part: int, computed: bool) -> None:
        nonlocal told
        heartbeat(f"reference log-probabilities of {name}")
        now, share = time.monotonic(), min(1.0, (part + 1) * stride / len(rows))
        if computed and state.rank == 0 and (now - told > TELL_SECONDS or share == 1.0):
            told = now
            print(f"reference {name}: {share:.0%} in {now - began:.0f} s", file=sys.stderr, flush=True)

    training = stage.model.training
    stage.model.eval()
    parts = compute_parts(
        Path(config.run_dir) / FOLDER / name,
        _fingerprint(config, stage.start, split, stride, rows.row_length),
        -(-len(rows) // stride),
        compute,
        state,
        done,
    )
    stage.model.train(training)
    reference = np.empty((len(rows.row_of), 2))
    reference[np.concatenate(rows.pairs_of)] = np.concatenate(parts)
    return reference


def _fingerprint(config: Config, start: Start, split: Split, stride: int, row_length: int) -> str:
    """Of what the log-probabilities follow from, and their order, which is that of rows packed to `row_length` tokens.
    The layout is no part of it, but where it cuts the parts."""
    adapter = [config.adapter.model_dump() if config.adapter else None, start.adapter]
    weights = [config.model.model_dump(), start.weights, config.train.seed if config.model.preset else None, adapter]
    parts = [weights, split.content, config.train.dtype, stride, row_length]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
