"""Speed of a training step on CPU against transformers' own forward and backward, and the cost of the teacher.

    python benchmarks/train_cpu.py [--rounds 5] [--out benchmarks/results/train_cpu.md]

All contenders take turns in one process, so that a slow minute of the machine hits them alike; the ratios are medians
of the rounds' ratios. The model has SmolLM2-135M's shape and random weights (speed does not depend on them).
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

import torch
import transformers
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

import megatron_mixcpt
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.config import LossConfig
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.model.build import build_gpt
from megatron_mixcpt.model.load import load_hf
from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.teacher import InitialTeacher

THREADS = 2


def smollm2(folder: Path) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
    return model


def batch_of(seq_length: int, documents: int, vocab_size: int = 49152) -> Batch:
    tokens = torch.randint(0, vocab_size, (1, seq_length + 1), generator=torch.Generator().manual_seed(0))
    doc_start = torch.zeros(1, seq_length, dtype=torch.bool)
    doc_start[0, :: seq_length // documents] = True
    packing = Documents.of(doc_start)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        kinds=torch.zeros(1, seq_length, dtype=torch.int64),
        position_ids=packing.position_ids(),
        packing=packing,
        source=torch.zeros(1, dtype=torch.int64),
    )


def contenders(folder: Path, seq_length: int) -> dict:
    """`{name: function that runs one forward and backward}`."""
    reference = smollm2(folder).train()
    arch = architecture_from_hf(str(folder))

    def stage():
        model = build_gpt(arch, seed=None)
        load_hf(model, folder)
        return model

    student, teacher = stage(), InitialTeacher(stage(), pipelined=False)
    model = DistributedDataParallel(student.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), student)
    student.config.finalize_model_grads_func = finalize_model_grads
    device = torch.device("cpu")

    def runner(target: str) -> ForwardBackward:
        used = None if target == "none" else teacher
        loss = MixCPTLoss(LossConfig(target=target), used, group=None, vocab_start=0, vocab_size=49152, device=device)
        return ForwardBackward(model, loss, num_sources=1, contributes=True)

    plain, packed = batch_of(seq_length, 1), batch_of(seq_length, 4)
    ce_only, mixcpt = runner("none"), runner("swap")

    def transformers_step():
        reference.zero_grad(set_to_none=True)
        reference(input_ids=plain.tokens, labels=plain.tokens, use_cache=False).loss.backward()

    def ours(run, batch):
        def step():
            model.zero_grad_buffer()
            run([batch])

        return step

    return {
        "transformers": transformers_step,
        "ours, CE only": ours(ce_only, plain),
        "ours, CE only, 4 packed documents": ours(ce_only, packed),
        "ours, Mix-CPT (teacher + LSSD)": ours(mixcpt, plain),
    }


def measure(steps: dict, rounds: int) -> dict[str, list[float]]:
    seconds = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def report(seconds: dict[str, list[float]], seq_length: int) -> str:
    rows = []
    for name, times in seconds.items():
        speed = seq_length / statistics.median(times)
        relative = statistics.median(t / own for t, own in zip(seconds["transformers"], times))
        rows.append(f"| {name} | {statistics.median(times):.2f} | {speed:.0f} | {relative:.2f} |")
    ce = statistics.median(
        mix / own for mix, own in zip(seconds["ours, Mix-CPT (teacher + LSSD)"], seconds["ours, CE only"])
    )
    return f"""# Training step on CPU

`python benchmarks/train_cpu.py`: SmolLM2-135M's shape, {seq_length} tokens a step, fp32, {THREADS} threads, forward and
backward; medians of {len(seconds["transformers"])} interleaved rounds in one process.

| step | seconds | tokens/s | tokens/s, transformers = 1 |
|---|---|---|---|
{chr(10).join(rows)}

A Mix-CPT step takes **{ce:.2f} x** a CE-only step (aim: at most 1.5; the teacher's forward alone is 4/3).

Measured {date.today()} on {cpu_name()} ({os.cpu_count()} cores), torch {torch.__version__}, transformers
{transformers.__version__}, megatron-mixcpt {megatron_mixcpt.__version__}, Python {platform.python_version()}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_cpu.md"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder, parallel_context():
        seconds = measure(contenders(Path(folder), args.seq_length), args.rounds)
    text = report(seconds, args.seq_length)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)


if __name__ == "__main__":
    main()
