"""Attention over packed documents on CPU: by documents, with a dense mask, and as transformers packs and pads them.

    python benchmarks/attention_cpu.py [--rounds 3] [--long] [--out benchmarks/results/attention_cpu.md]

Documents have the lengths of short medical articles (log-normal, 210 tokens in the middle), packed to rows. Contenders
take turns in one process of one thread; what is compared is CPU time of the process, which other programs on the
machine disturb least. `--long` also trains one row of 131,072 tokens on two context-parallel ranks.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lssd_memory import PeakMemory
from megatron_mixcpt.architecture.architecture import PRESETS
from megatron_mixcpt.attention.core import attention
from megatron_mixcpt.attention.documents import QUERIES, Documents
from megatron_mixcpt.attention.reference import dense_mask
from megatron_mixcpt.config import LossConfig
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.model.build import build_gpt
from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.runtime.parallel import parallel_context

HEADS, GROUPS, HEAD_DIM = 9, 3, 64  # of SmolLM2-135M
LENGTHS = (2048, 8192, 32768)
LARGEST_MASK = 8192
PADDED = 8  # documents of a padded batch
VOCABULARY = 8192
LONG = 131072


def packed(length: int) -> Tensor:
    """doc_start bool `[1, s]`."""
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.normal(np.log(210), 0.8, size=length)).clip(8, length).astype(int)
    starts = np.cumsum(sizes)
    doc_start = torch.zeros(1, length, dtype=torch.bool)
    doc_start[0, 0] = True
    doc_start[0, starts[starts < length]] = True
    return doc_start


def tensors(length: int) -> list[Tensor]:
    shapes = [(length, 1, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What the trainer did before: one call, heads repeated, a mask of all scores."""
    q, k, v = (x.repeat_interleave(HEADS // x.shape[2], dim=2).permute(1, 2, 0, 3) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(2, 0, 1, 3)


def padded(query: Tensor, key: Tensor, value: Tensor, spans: np.ndarray) -> Tensor:
    """Batches of PADDED documents, each padded to its longest, as a padding collator makes them."""
    sizes = spans[:, QUERIES].tolist()
    documents = [x[:, 0].split(sizes) for x in (query, key, value)]
    found = []
    for first in range(0, len(sizes), PADDED):
        batch = slice(first, first + PADDED)
        q, k, v = (torch.nn.utils.rnn.pad_sequence(x[batch], batch_first=True).transpose(1, 2) for x in documents)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        found += [row[:size] for row, size in zip(out, sizes[batch])]
    return torch.cat(found).unsqueeze(1)


def attention_contenders(length: int) -> dict[str, Callable[[], object]]:
    doc_start = packed(length)
    documents = Documents.of(doc_start)
    inputs, upstream = tensors(length), torch.randn(length, 1, HEADS, HEAD_DIM)

    def both_ways(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)

    steps = {
        "by documents": both_ways(lambda q, k, v: attention(q, k, v, documents)),
        "padded batches of documents": both_ways(lambda q, k, v: padded(q, k, v, documents.spans)),
    }
    if length <= LARGEST_MASK:
        mask = dense_mask(doc_start).unsqueeze(1)
        steps["dense mask"] = both_ways(lambda q, k, v: dense(q, k, v, mask))
    return steps


def batch_of(length: int) -> Batch:
    packing = Documents.of(packed(length))
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    source = torch.zeros(1, dtype=torch.int64)
    return Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), packing.position_ids(), packing, source)


def trainer(preset: str) -> ForwardBackward:
    """Forward and backward of a preset, cross-entropy alone."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    arch = replace(PRESETS[preset], vocab_size=VOCABULARY)
    stage = build_gpt(arch)
    model = DistributedDataParallel(stage.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), stage)
    stage.config.finalize_model_grads_func = finalize_model_grads
    loss = MixCPTLoss(
        LossConfig(target="none"),
        None,
        group=None,
        vocab_start=0,
        vocab_size=arch.vocab_size,
        device=torch.device("cpu"),
    )
    return ForwardBackward(model, loss, num_sources=1, contributes=True)


def peers(length: int) -> dict[str, Callable[[], object]]:
    """The same step as transformers makes it: batches that are padded, and rows packed its own way."""
    import transformers

    arch = PRESETS["tiny"]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    batch = batch_of(length)
    sizes = batch.packing.spans[:, QUERIES].tolist()

    def packed_rows() -> None:
        inputs = {"input_ids": batch.tokens, "position_ids": batch.position_ids, "labels": batch.tokens}
        model(**inputs, use_cache=False).loss.backward()

    def padded_batches() -> None:
        documents = batch.tokens[0].split(sizes)
        for first in range(0, len(sizes), PADDED):
            some = documents[first : first + PADDED]
            ids = torch.nn.utils.rnn.pad_sequence(list(some), batch_first=True)
            there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in some], batch_first=True)
            labels = ids.masked_fill(there == 0, -100)
            model(input_ids=ids, attention_mask=there, labels=labels, use_cache=False).loss.backward()

    steps: dict[str, Callable[[], object]] = {"transformers, padded batches": padded_batches}
    if length <= LARGEST_MASK:
        steps["transformers, its own packing"] = packed_rows
    return steps


def measure(steps: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median CPU seconds of each."""
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):  # the first warms up
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - began)
            print(f"{name}: {time.process_time() - began:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak(step: Callable[[], object]) -> float:
    with PeakMemory() as memory:
        step()
    return memory.peak / 2**20


def long_row() -> str:
    """One step of the preset `tiny` on a row of 131,072 tokens, on two context-parallel ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__, "--rank-of-long-row"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return next(line for line in done.stdout.splitlines() if "tokens" in line)


def rank_of_long_row() -> None:
    with parallel_context(context=2, timeout_minutes=60) as state:
        run, batch = trainer("tiny"), batch_of(LONG)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        began = time.perf_counter()
        totals = run([batch])
        torch.distributed.all_reduce(totals)
        seconds = time.perf_counter() - began
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
        if state.rank == 0:
            mean = float(totals[0, 1] / totals[0, 0])
            print(f"a row of {LONG} tokens, tiny, CP2: {seconds:.0f} s, {taken:.1f} GiB a rank, loss {mean:.3f}")


def report(rounds: int, *, long: bool) -> str:
    rows = []
    for length in LENGTHS:
        steps = attention_contenders(length)
        seconds = measure(steps, rounds)
        for name, step in steps.items():
            ratio = seconds[name] / seconds["by documents"]
            rows.append(f"| {length} | {name} | {seconds[name]:.3f} | {ratio:.1f} | {peak(step):.0f} |")
    with parallel_context():
        run = trainer("tiny")
        contenders: dict[tuple[int, str], Callable[[], object]] = {}
        for length in LENGTHS:
            contenders[length, "ours"] = partial(run, [batch_of(length)])
            contenders |= {(length, name): step for name, step in peers(length).items()}
        seconds = measure(contenders, rounds)
        speed = {key: key[0] / value for key, value in seconds.items()}
        whole = [
            f"| {length} | {name} | {value:.0f} | {value / speed[2048, 'ours']:.2f} | "
            f"{peak(contenders[length, name]):.0f} |"
            for (length, name), value in speed.items()
        ]
    ending = f"\n{long_row()}\n" if long else ""
    return f"""# Attention over packed documents on CPU

`python benchmarks/attention_cpu.py`: {HEADS} heads in {GROUPS} groups of {HEAD_DIM} channels, fp32, forward and
backward, {torch.get_num_threads()} threads; CPU time, medians of {rounds} interleaved rounds. Memory: of tensors
that are alive together.

| row | attention | CPU seconds | by documents = 1 | MiB |
|---|---|---|---|---|
{chr(10).join(rows)}

A whole step of the preset `tiny` with {VOCABULARY} entries, forward and backward, cross-entropy alone. Padded
batches hold {PADDED} documents. Beyond {LARGEST_MASK} tokens transformers' packing would make a mask of rows by rows:

| row | step | tokens a CPU second | ours at 2048 = 1 | MiB |
|---|---|---|---|---|
{chr(10).join(whole)}
{ending}
Measured {date.today()}, torch {torch.__version__}, {os.cpu_count()} cores.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="also a row of 131,072 tokens on two ranks")
    parser.add_argument("--rank-of-long-row", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_cpu.md"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # threads that wait for one another count as CPU time
    if args.rank_of_long_row:
        return rank_of_long_row()
    text = report(args.rounds, long=args.long)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)


if __name__ == "__main__":
    main()
