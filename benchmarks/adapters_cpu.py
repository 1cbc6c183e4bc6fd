"""What adapters cost on CPU: a step of ALoRA against one of LoRA, and the memory that the adapter_off teacher takes.

    python -m benchmarks.adapters_cpu [--rounds 5] [--out benchmarks/results/adapters_cpu.md]

Steps take turns in one process; ratios are medians of the rounds' ratios, in wall and in CPU seconds (the latter do not
count what other programs take of the machine). Memory is the peak of a process of its own for each case, above what it
held before the model was built. The model has SmolLM2-135M's shape and random weights.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

import megatron_mixcpt
from benchmarks.train_cpu import batch_of, cpu_name
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import AdapterConfig, LossConfig, TrainConfig
from megatron_mixcpt.model.build import build_gpt
from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.teacher import InitialTeacher
from megatron_mixcpt.teacher.adapter_off import AdapterOffTeacher
from megatron_mixcpt.train.optimizer import build_optimizer, optimizer_step

RANK = 16
SMOLLM2 = Architecture(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)
# name -> (method, teacher)
SPEED = {
    "all weights": (None, "none"),
    "LoRA": ("lora", "none"),
    "ALoRA": ("alora", "none"),
    "LoRA, adapter_off teacher": ("lora", "adapter_off"),
}
MEMORY = {
    "LoRA": ("lora", "none"),
    "LoRA, adapter_off teacher": ("lora", "adapter_off"),
    "LoRA, teacher in a copy": ("lora", "initial"),
}


def make_step(arch: Architecture, method: str | None, teacher: str, seq_length: int, documents: int):
    """A function that runs forward, backward and the optimizer on one packed sequence."""

    def stage(adapter):
        model = build_gpt(arch, adapter=adapter)
        for module in model.adapters():
            module.initialize(0)
        return model

    student = stage(AdapterConfig(method=method, rank=RANK) if method else None)
    frozen = None
    if teacher == "adapter_off":
        frozen = AdapterOffTeacher(student, pipelined=False)
    elif teacher == "initial":
        frozen = InitialTeacher(stage(None), pipelined=False)
    model = DistributedDataParallel(student.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), student)
    student.config.finalize_model_grads_func = finalize_model_grads
    settings = TrainConfig(steps=100, dtype="fp32", lr=1e-4)
    optimizer = build_optimizer(model, settings)
    loss = MixCPTLoss(
        LossConfig(target="none" if frozen is None else "swap"),
        frozen,
        group=None,
        vocab_start=0,
        vocab_size=arch.vocab_size,
        device=torch.device("cpu"),
    )
    run = ForwardBackward(model, loss, num_sources=1, contributes=True)
    batch = batch_of(seq_length, documents)

    def step():
        model.zero_grad_buffer()
        optimizer.zero_grad()
        run([batch])
        optimizer_step(optimizer, 0, settings)

    return step


def measure_speed(seq_length: int, documents: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of every round by case."""
    with parallel_context():
        steps = {name: make_step(SMOLLM2, *case, seq_length, documents) for name, case in SPEED.items()}
        for step in steps.values():
            step()
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _peak(case: tuple[str | None, str], seq_length: int, documents: int, path: str) -> None:
    """In a process of its own: bytes above the start at the peak of two steps."""
    warnings.filterwarnings("ignore")
    import ctypes

    ctypes.CDLL("libc.so.6").mallopt(-3, 64 << 10)  # tensors on pages of their own, which leave when they are freed
    torch.set_num_threads(1)
    with parallel_context():
        small = Architecture(2, 64, 128, 2, 1, 32, SMOLLM2.vocab_size)
        make_step(small, "lora", "none", 64, 2)()  # brings the libraries' pages in
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        step = make_step(SMOLLM2, *case, seq_length, documents)
        for _ in range(2):
            step()
        Path(path).write_text(json.dumps(_status("VmHWM") - before))


def measure_memory(seq_length: int, documents: int, folder: Path) -> dict[str, int]:
    peaks = {}
    for index, (name, case) in enumerate(MEMORY.items()):
        path = folder / f"adapters-{index}.json"
        process = multiprocessing.get_context("spawn").Process(
            target=_peak, args=(case, seq_length, documents, str(path))
        )
        process.start()
        process.join()
        peaks[name] = json.loads(path.read_text())
    return peaks


def report(seconds: dict, peaks: dict[str, int], seq_length: int, documents: int, threads: int) -> str:
    def ratio(name: str, other: str, which: int) -> float:
        return statistics.median(a[which] / b[which] for a, b in zip(seconds[name], seconds[other]))

    rows = [
        f"| {name} | {statistics.median(t[0] for t in times):.2f} | {statistics.median(t[1] for t in times):.2f} "
        f"| {ratio(name, 'LoRA', 0):.2f} | {ratio(name, 'LoRA', 1):.2f} |"
        for name, times in seconds.items()
    ]
    memory = [f"| {name} | {peak / 2**20:.0f} | {peak / peaks['LoRA'] - 1:+.1%} |" for name, peak in peaks.items()]
    return f"""# Adapters on CPU

`python -m benchmarks.adapters_cpu`: SmolLM2-135M's shape, adapters of rank {RANK} beside all linear layers, one
sequence of {seq_length} tokens in {documents} packed documents a step, fp32, {threads} thread(s); forward, backward and
optimizer; medians of {len(seconds["LoRA"])} interleaved rounds in one process.

| step | wall seconds | CPU seconds | LoRA = 1, wall | LoRA = 1, CPU |
|---|---|---|---|---|
{chr(10).join(rows)}

An ALoRA step takes **{ratio("ALoRA", "LoRA", 1):.2f} x** the CPU seconds of a LoRA step (aim: at most 1.25).

| peak memory of a process | MiB | over LoRA without a teacher |
|---|---|---|
{chr(10).join(memory)}

The aim for adapter_off is at most +2 %.

Measured {date.today()} on {cpu_name()} ({os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}), torch
{torch.__version__}, megatron-mixcpt {megatron_mixcpt.__version__}, Python {platform.python_version()}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters_cpu.md"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        peaks = measure_memory(args.seq_length, args.documents, Path(folder))
    seconds = measure_speed(args.seq_length, args.documents, args.rounds)
    text = report(seconds, peaks, args.seq_length, args.documents, args.threads)
    print(text)
    args.out.write_text(text)


if __name__ == "__main__":
    main()
