"""Models, batches and the trainer's step that training, profiling and peers have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters_cpu import SMOLLM2
from benchmarks.train_cpu import batch_of
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.throughput import flops_per_token, peak_flops
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.rehearse.scale import write_model
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.train.optimizer import optimizer_step
from megatron_mixcpt.train.setup import build
from tests.helpers.corpus import write_mix

LLAMA_1B = Architecture(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=16384,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)
MODELS = {
    "SmolLM2 135M": dataclasses.replace(SMOLLM2, max_position_embeddings=16384),
    "Llama 1B": LLAMA_1B,
}
TOKENS = (4096, 16384)  # of a step
PACKED = 1024  # tokens of a packed document
SMALL_MODELS = {"tiny": Architecture(2, 64, 128, 4, 2, 16, 256, tie_word_embeddings=True)}
SMALL_TOKENS, SMALL_PACKED = (64,), 16
SECONDS, WARM, MOST = 1.5, 3, 30  # of measuring, at least; steps before, and at most
LOSSES: dict[str, dict[str, Any]] = {
    "Mix-CPT": {},
    "CE only": {"loss": {"target": "none"}, "teacher": {"source": "none"}},
}


def device() -> torch.device:
    return torch.device(os.environ["MIXCPT_DEVICE"])


def wait() -> None:
    """For the device to have done what was asked of it."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def write_random(arch: Architecture, folder: Path) -> Path:
    """A Hugging Face directory, drawn on the device: a second for a billion weights."""

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        return (0.02 * torch.randn(shape, device=device())).to(torch.bfloat16).cpu()

    write_model(arch, folder, torch.bfloat16, drawn)
    return folder


@contextlib.contextmanager
def trainer(
    arch: Architecture, model: Path, folder: Path, recompute: str, sections: dict[str, Any]
) -> Iterator[tuple[Callable[[Batch], object], Callable[[], object]]]:
    """(forward and backward of a batch, what the optimizer does then) of the trainer in bf16."""
    data = folder / "data" / "mix.json"
    if not data.exists():
        write_mix(folder / "data", seq_length=32, vocab_size=arch.vocab_size, train=4, valid=1)
    values: dict[str, Any] = {
        "model": {"hf": str(model)},
        "data": {"mix": str(data)},
        "run_dir": str(folder / "run"),
        **sections,
        "train": {"steps": 10_000, "recompute": recompute},
    }
    config = validate(Config, values, "benchmark")
    free()
    with parallel_context() as state:
        components = build(config, state)
        steps = iter(range(config.train.steps))

        def forward_backward(batch: Batch) -> object:
            components.model.zero_grad_buffer()
            components.optimizer.zero_grad()
            return components.run([batch])

        yield forward_backward, lambda: optimizer_step(components.optimizer, next(steps), config.train)


def batch(arch: Architecture, tokens: int, document: int) -> Batch:
    """A row of documents of one length."""
    return batch_of(tokens, tokens // document, arch.vocab_size)


def measured(
    arch: Architecture,
    tokens: int,
    document: int,
    forward_backward: Callable[[], object],
    optimize: Callable[[], object],
    *,
    teacher: Architecture | None = None,
    small: bool,
) -> dict[str, Any]:
    """Median times of a step's two halves, speed, MFU and the most memory that a step took."""
    for _ in range(1 if small else WARM):
        forward_backward()
        optimize()
    wait()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    halves: list[tuple[float, float]] = []
    began = time.perf_counter()
    while not halves or (not small and len(halves) < MOST and time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        forward_backward()
        wait()
        middle = time.perf_counter()
        optimize()
        wait()
        halves.append((middle - start, time.perf_counter() - middle))
    first, second = (statistics.median(half) for half in zip(*halves))
    speed = tokens / (first + second)
    peak = peak_flops(device(), "bf16")
    flops = flops_per_token(arch, {document: 1.0}, teacher=teacher)
    return {
        "forward + backward ms": 1000 * first,
        "optimizer ms": 1000 * second,
        "tokens/s": speed,
        "MFU": speed * flops / peak if peak else None,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if device().type == "cuda" else None,
    }
