"""What alignment costs on CPU: scoring against a bare forward pass, a DPO step against its passes, memory of the loss.

    python -m benchmarks.align_cpu [--rounds 5] [--out benchmarks/results/align_cpu.md]

Contenders take turns in one process; ratios are medians of the rounds' ratios of CPU seconds, which other work on the
machine does not count in. Random weights of preset `small`, fp32.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

import megatron_mixcpt
from benchmarks.lssd_memory import PeakMemory
from megatron_mixcpt.architecture.architecture import PRESETS
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.config import AlignSettings, LossConfig
from megatron_mixcpt.data.batch import IGNORE_INDEX
from megatron_mixcpt.data_prep.format import DOC_START, TARGET
from megatron_mixcpt.model.build import build_gpt
from megatron_mixcpt.objectives.answers import AnswerBatch, AnswerSums
from megatron_mixcpt.objectives.dpo import DPOObjective
from megatron_mixcpt.objectives.logprobs import TokenLogProbs
from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
from megatron_mixcpt.objectives.pairs import collate_pairs
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.runtime.parallel import ParallelState, parallel_context

THREADS = 1
ARCH = PRESETS["small"]
ROWS, LENGTH = 4, 256
Steps = dict[str, Callable[[], object]]


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, ARCH.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def answer_batch() -> AnswerBatch:
    """Unpadded rows whose second halves are the responses."""
    tokens = random_tokens(ROWS, LENGTH + 1)
    labels = torch.where(torch.arange(LENGTH) >= LENGTH // 2, tokens[:, 1:], IGNORE_INDEX)
    place, row = torch.nonzero(labels.t() != IGNORE_INDEX, as_tuple=True)
    packing = Documents.whole(ROWS, LENGTH)
    return AnswerBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=labels,
        kinds=torch.zeros_like(labels),
        position_ids=packing.position_ids(),
        packing=packing,
        source=torch.zeros(ROWS, dtype=torch.int64),
        targets=place * ROWS + row,
        documents=row,
        num_documents=ROWS,
    )


def pair_sample(number: int) -> dict:
    """A row of one pair: chosen and rejected of `LENGTH` tokens each, the second halves being the answers."""
    tokens = random_tokens(2 * LENGTH + 1).roll(number)
    flags = torch.zeros(2 * LENGTH + 1, dtype=torch.uint8)
    for start in (0, LENGTH):
        flags[start] = DOC_START
        flags[start + LENGTH // 2 : start + LENGTH] = TARGET
    return {"tokens": tokens, "flags": flags, "reference": torch.zeros(1, 2, dtype=torch.float64)}


def contenders(state: ParallelState) -> tuple[Steps, Steps]:
    stage = build_gpt(ARCH)
    log_probs = TokenLogProbs(state, 0, ARCH.vocab_size)
    answers = answer_batch()
    score = ForwardBackward(stage, AnswerSums(log_probs), num_sources=1, contributes=True)

    @torch.no_grad()
    def forward() -> None:
        stage(answers.tokens, answers.position_ids, answers.packing)

    @torch.no_grad()
    def scoring() -> None:
        score([answers], forward_only=True)

    model = DistributedDataParallel(stage.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), stage)
    stage.config.finalize_model_grads_func = finalize_model_grads
    pairs = collate_pairs([pair_sample(number) for number in range(2)])
    loss = MixCPTLoss(
        LossConfig(target="none"), None, group=None, vocab_start=0, vocab_size=ARCH.vocab_size, device=state.device
    )
    settings = AlignSettings(method="dpo")
    dpo = ForwardBackward(model, DPOObjective(settings, log_probs), num_sources=1, contributes=True)
    plain = ForwardBackward(model, loss, num_sources=1, contributes=True)

    def step(run: ForwardBackward) -> Callable[[], None]:
        def passes() -> None:
            model.zero_grad_buffer()
            run([pairs])

        return passes

    @torch.no_grad()
    def reference() -> None:
        stage(pairs.tokens, pairs.position_ids, pairs.packing)

    scored: Steps = {"forward pass": forward, "scoring": scoring}
    trained: Steps = {"policy passes": step(plain), "reference passes": reference, "DPO step": step(dpo)}
    return scored, trained


def measure(steps: Steps, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up
    for _ in range(rounds):
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return found


def loss_memory(state: ParallelState, num_tokens: int) -> float:
    """Peak MiB of log-probabilities and their gradients, beside the hidden states and the head's gradient."""
    log_probs = TokenLogProbs(state, 0, ARCH.vocab_size)
    hidden = torch.randn(num_tokens, 1, ARCH.hidden_size, requires_grad=True)
    head = torch.randn(ARCH.vocab_size, ARCH.hidden_size, requires_grad=True)
    labels = torch.arange(num_tokens).remainder(ARCH.vocab_size)[None]
    targets = torch.arange(num_tokens)
    with PeakMemory() as memory:
        torch.autograd.grad(log_probs(hidden, head, labels, targets).sum(), (hidden, head))
    return (memory.peak - head.numel() * 4) / 2**20


def report(scored: dict, trained: dict, memory: dict[int, float]) -> str:
    def cpu(times: dict, name: str) -> list[float]:
        return [seconds for seconds, _ in times[name]]

    rows = "\n".join(
        f"| {name} | {statistics.median(cpu(times, name)):.2f} | {statistics.median(w for _, w in times[name]):.2f} |"
        for times in (scored, trained)
        for name in times
    )
    speed = statistics.median(a / b for a, b in zip(cpu(scored, "forward pass"), cpu(scored, "scoring")))
    policy, reference, dpo = (cpu(trained, name) for name in trained)
    four = statistics.median(d / (p + r) for p, r, d in zip(policy, reference, dpo))
    own = statistics.median(d / p for p, d in zip(policy, dpo))
    first, *_, last = memory.values()
    logits = max(memory) * ARCH.vocab_size * 4 / 2**20
    held = "\n".join(f"| {tokens} | {size:.0f} |" for tokens, size in memory.items())
    return f"""# Alignment on CPU

`python -m benchmarks.align_cpu`: preset `small` ({ARCH.num_parameters / 1e6:.0f} M parameters, vocabulary
{ARCH.vocab_size}), fp32, {THREADS} thread; medians of {len(dpo)} interleaved rounds in one process.

| | CPU seconds | wall seconds |
|---|---:|---:|
{rows}

Scoring reaches **{speed:.2f}** of a bare forward pass's tokens/s at the same shapes ({ROWS} x {LENGTH} tokens, half of
them responses; aim: at least 0.9). It can exceed 1: prompts never meet the output head.

A DPO step takes **{four:.2f}** of the passes it stands for (policy and reference, chosen and rejected, 2 x {2 * LENGTH}
tokens; aim: at most 1.15), and {own:.2f} of the policy's passes alone: the reference is read from the run directory.

| answer tokens | peak MiB of the loss, forward and backward |
|---:|---:|
{held}

Chunks of 1024 tokens meet the output head: {max(memory) // min(memory)} times the tokens take {last - first:.0f} MiB
more (hidden states and their gradients), where whole logits would take {logits:.0f} MiB.

Measured {date.today()} on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, megatron-mixcpt
{megatron_mixcpt.__version__}, Python {platform.python_version()}. Where wall seconds exceed CPU seconds the machine was
busy with other work. No GPU has run this.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/align_cpu.md"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    with parallel_context() as state:
        scored, trained = contenders(state)
        text = report(
            measure(scored, args.rounds),
            measure(trained, args.rounds),
            {tokens: loss_memory(state, tokens) for tokens in (1024, 2048, 4096)},
        )
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)


if __name__ == "__main__":
    main()
