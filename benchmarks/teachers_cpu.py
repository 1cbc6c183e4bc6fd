"""What a cached teacher costs: a training step against one without a teacher, and bytes a token.

    python -m benchmarks.teachers_cpu [--rounds 5] [--out benchmarks/results/teachers_cpu.md]

The model has SmolLM2-135M's vocabulary and head over fewer layers, so that the loss weighs more than in the real one,
and random weights. The cache is written and read through the files that `mixcpt cache-teacher` and `mixcpt train` use.
The three steps take turns in one process on the same sequence; ratios are medians of the rounds' ratios.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

import megatron_mixcpt
from benchmarks.train_cpu import cpu_name
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config, LossConfig, validate
from megatron_mixcpt.data.batch import collate
from megatron_mixcpt.data.dataset import train_dataset
from megatron_mixcpt.data.position import Draw
from megatron_mixcpt.data_prep.format import DOC_START, TARGET, IndexedWriter, token_dtype
from megatron_mixcpt.data_prep.mix import Mix, Source, Split, TokenizerEntry, write_mix
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.model.build import build_gpt
from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
from megatron_mixcpt.objectives.step import ForwardBackward
from megatron_mixcpt.runtime.parallel import ParallelState, parallel_context
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.teacher import InitialTeacher, Teacher
from megatron_mixcpt.teacher.cache_fill import claim_cache, fill_cache, new_identity
from megatron_mixcpt.teacher.cache_format import record_dtype
from megatron_mixcpt.teacher.cached import CachedTeacher, open_cache

VOCABULARY, LAYERS, TOP_K, SEQUENCES = 49152, 10, 32, 2
NONE, ONLINE, CACHED = "no teacher (CE only)", "initial", f"cached, k = {TOP_K}"


def architecture(folder: Path) -> Architecture:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return architecture_from_hf(str(folder))


def write_data(folder: Path, seq_length: int) -> Mix:
    """A mixture of one source of random sequences, one document each."""
    generator = np.random.default_rng(0)
    flags = np.full(seq_length, TARGET, np.uint8)
    flags[0] = DOC_START
    with IndexedWriter(folder / "text", token_dtype(VOCABULARY)) as writer:
        with IndexedWriter(folder / "text.flags", np.dtype(np.uint8)) as marker:
            for _ in range(SEQUENCES):
                writer.add(generator.integers(0, VOCABULARY, seq_length).astype(token_dtype(VOCABULARY)))
                marker.add(flags)
            marker.finish()
        digest = writer.finish()
    train = Split(folder / "text", SEQUENCES, SEQUENCES * seq_length, digest)
    tokenizer = TokenizerEntry("huggingface", folder / "tokenizer", VOCABULARY, "0", None, 0, 0)
    source = Source("text", "domain", 1.0, train, None)
    path = folder / "mix.json"
    return write_mix(path, Mix(path, seq_length, "", tokenizer, (source,)))


def fill(folder: Path, arch: Architecture, mix: Mix, teacher: Teacher, state: ParallelState) -> CachedTeacher:
    """The cache of `teacher`, through its files."""
    values = {
        "model": {"preset": "tiny"},
        "data": {"mix": str(mix.path)},
        "train": {"steps": 1, "dtype": "fp32"},
        "teacher": {"source": "cached", "cache": str(folder / "cache")},
        "run_dir": str(folder / "run"),
    }
    config, cache = validate(Config, values, "benchmark"), folder / "cache"
    identity = new_identity(config, arch, mix, {}, top_k=TOP_K, bits=16)
    claim_cache(cache, identity)
    with StopRequest() as stop:
        fill_cache(cache, identity, teacher, mix, state, stop, micro_batch_size=1, vocab_start=0)
    return CachedTeacher(cache, open_cache(config, arch, mix), mix, reads=True)


def measure(folder: Path, seq_length: int, rounds: int, state: ParallelState) -> tuple[dict, dict]:
    """Wall and CPU seconds of every round, by contender."""
    arch, mix = architecture(folder), write_data(folder, seq_length)
    student, copy = build_gpt(arch, seed=1), build_gpt(arch, seed=2)
    online = InitialTeacher(copy, pipelined=False)
    cached = fill(folder, arch, mix, online, state)
    model = DistributedDataParallel(student.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), student)
    student.config.finalize_model_grads_func = finalize_model_grads
    batch = collate([train_dataset(mix, 0, folder / "index")[Draw(0, 0, 0)]])

    def runner(target: str, teacher: Teacher | None) -> ForwardBackward:
        loss = MixCPTLoss(
            LossConfig(target=target), teacher, group=None, vocab_start=0, vocab_size=VOCABULARY, device=state.device
        )
        return ForwardBackward(model, loss, num_sources=1, contributes=True)

    runs = {NONE: runner("none", None), ONLINE: runner("swap", online), CACHED: runner("swap", cached)}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first is warm-up
        for name, run in runs.items():
            model.zero_grad_buffer()
            began, worked = time.perf_counter(), time.process_time()
            run([batch])
            if number:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - worked)
    return wall, cpu


def report(wall: dict, cpu: dict, seq_length: int) -> str:
    def ratio(seconds: dict, name: str) -> float:
        return statistics.median(own / none for own, none in zip(seconds[name], seconds[NONE]))

    rows = [
        f"| {name} | {statistics.median(wall[name]):.2f} | {statistics.median(cpu[name]):.2f} "
        f"| {ratio(wall, name):.3f} | {ratio(cpu, name):.3f} |"
        for name in wall
    ]
    sizes = [
        f"| {vocabulary:,} | {k} | {record_dtype(4096, k, vocabulary, 16).itemsize / 4096:.0f} |"
        for vocabulary in (49152, 128256)
        for k in (32, 64)
    ]
    return f"""# Teachers on CPU

`python -m benchmarks.teachers_cpu`: SmolLM2-135M's vocabulary and width with {LAYERS} of its 30 layers, {seq_length}
tokens a step, fp32, 2 threads, forward and backward; medians of {len(wall[NONE])} interleaved rounds in one process.

| teacher | seconds | CPU seconds | seconds, no teacher = 1 | CPU seconds, no teacher = 1 |
|---|---|---|---|---|
{chr(10).join(rows)}

Aim: a cached step within 5 % of a step without a teacher. On a busy machine the CPU seconds are the ones to compare.
Seconds are medians of the rounds, ratios medians of the rounds' own ratios: on a busy machine one is not the other's
quotient.

| vocabulary | k | bytes a token |
|---|---|---|
{chr(10).join(sizes)}

Aim: at most 250 bytes a token at k = 32.

Measured {date.today()} on {cpu_name()} ({os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}), torch
{torch.__version__}, megatron-mixcpt {megatron_mixcpt.__version__}, Python {platform.python_version()}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/teachers_cpu.md"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder, parallel_context() as state:
        text = report(*measure(Path(folder), args.seq_length, args.rounds, state), args.seq_length)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)


if __name__ == "__main__":
    main()
