"""The LSSD loss on a CPU: time beside the textbook expression in the same run, and memory against tokens.

    python -m benchmarks.lssd_cpu                 # prints the tables
    python -m benchmarks.lssd_cpu --write         # and keeps them in benchmarks/results/lssd_cpu.md

Every time is the least of the repeats, the one least disturbed by whatever else the machine does, of forward and
backward with an upstream gradient for each token; the aim is at most half of the eager time at 512 x 49152 in fp32.
Peaks are bytes of tensors alive together, beyond the inputs.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lssd_eager import eager_lssd_loss
from benchmarks.lssd_memory import PeakMemory
from megatron_mixcpt.kernels import linear_lssd_loss, lssd_loss

RESULTS = Path(__file__).parent / "results" / "lssd_cpu.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AIM = 0.5
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def tokens(num_tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(num_tokens, vocab, generator=generator).to(dtype) for _ in range(2))
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return student.requires_grad_(), teacher, labels, torch.rand(num_tokens, generator=generator)


def milliseconds(losses: dict[str, Loss], inputs: tuple[Tensor, ...], repeats: int) -> dict[str, float]:
    """Least time of each; they take turns, so that a disturbance of the machine does not meet only one of them."""
    student, teacher, labels, upstream = inputs
    times: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(repeats + 1):
        for name, loss in losses.items():
            start = time.perf_counter()
            torch.autograd.grad(loss(student, teacher, labels), student, upstream)
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: 1000 * min(values) for name, values in times.items()}


def times_table(num_tokens: int, vocab: int, repeats: int) -> str:
    lines = [
        f"Forward and backward of {num_tokens} x {vocab}:",
        "",
        "| dtype | tau | eager ms | ours ms | ours / eager | CE alone / eager |",
        "|---|---|---|---|---|---|",
    ]
    for name, dtype in DTYPES.items():
        for temperature in (1.0, 2.0):
            losses: dict[str, Loss] = {
                "eager": lambda s, t, y, tau=temperature: eager_lssd_loss(s, t, y, tau),  # type: ignore[misc]
                "ours": lambda s, t, y, tau=temperature: lssd_loss(s, t, y, temperature=tau),  # type: ignore[misc]
                "ce": lambda s, t, y: lssd_loss(s, None, y),
            }
            ms = milliseconds(losses, tokens(num_tokens, vocab, dtype), repeats)
            ratios = [f"{ms[key] / ms['eager']:.2f}" for key in ("ours", "ce")]
            lines.append(f"| {name} | {temperature} | {ms['eager']:.0f} | {ms['ours']:.0f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def peak_megabytes(loss: Loss, inputs: tuple[Tensor, ...]) -> float:
    student, teacher, labels, upstream = inputs
    with PeakMemory() as memory:
        torch.autograd.grad(loss(student, teacher, labels), student, upstream)
    return memory.peak / 2**20


def memory_table(num_tokens: int, vocab: int) -> str:
    """Peaks for growing numbers of tokens; the gradient, which nobody can do without, has a column of its own."""
    lines = [
        f"Peak MiB beyond the inputs, vocabulary {vocab}, fp32:",
        "",
        "| tokens | the gradient | eager | ours | ours - gradient | ours, over the teacher | from hidden states |",
        "|---|---|---|---|---|---|---|",
    ]
    hidden = 64
    heads = [torch.randn(vocab, hidden) for _ in range(2)]
    for count in (num_tokens // 4, num_tokens, 4 * num_tokens):
        inputs = tokens(count, vocab, torch.float32)
        states = [torch.randn(count, hidden) for _ in range(2)]
        gradient = count * vocab * 4 / 2**20
        eager, ours = (peak_megabytes(loss, inputs) for loss in (eager_lssd_loss, lssd_loss))
        linear = peak_megabytes(
            lambda s, t, y: linear_lssd_loss(s, heads[0], t, heads[1], y, chunk_tokens=128),
            (states[0].requires_grad_(), states[1], inputs[2], inputs[3]),
        )
        over = peak_megabytes(lambda s, t, y: lssd_loss(s, t, y, grad_buffer="teacher"), inputs)
        values = (gradient, eager, ours, ours - gradient, over, linear)
        lines.append(f"| {count} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return "\n".join(lines)


def machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    implementation = os.environ.get("MIXCPT_LSSD") or "default"
    return (
        f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; "
        f"torch {torch.__version__}, Python {platform.python_version()}; MIXCPT_LSSD {implementation}. "
        f"Load before the run: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; where that is above 0, the ratios "
        "count, not the milliseconds."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lssd_cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {RESULTS.name}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    where = machine()
    report = "\n\n".join(
        [
            "# The LSSD loss on a CPU",
            where,
            times_table(options.tokens, options.vocab, options.repeats),
            f"Aim: fp32 at temperature 1 in at most {AIM} of the eager time.",
            memory_table(options.tokens, options.vocab),
            "Over the teacher: with `grad_buffer='teacher'`. From hidden states: `linear_lssd_loss` with 128 tokens a "
            "chunk; its gradients of hidden states and head are counted too.",
            "Made by `python -m benchmarks.lssd_cpu --write`.",
        ]
    )
    print(report)
    if options.write:
        RESULTS.write_text(report + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
