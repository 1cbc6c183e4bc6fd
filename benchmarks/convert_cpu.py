"""Speed and memory of `mixcpt convert` and `mixcpt export` against the disk's own copy of the same files.

    python -m benchmarks.convert_cpu [--gigabytes 1.2] [--rounds 3] [--out benchmarks/results/convert_cpu.md]

Each round copies the model's files (read, write, fsync), converts them and exports them back, in turn, so that a slow
minute of the machine hits all three alike; ratios are medians of the rounds' ratios. Each step runs in a process of its
own, whose peak memory is its high-water mark (VmHWM); its time leaves out starting Python and importing. Just before
its clock starts, a file of twice the model's size is written and removed: on a virtual machine the first use of a page
of memory that its host had taken back costs several times the copying into it, and hits whoever comes to it first.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import torch

import megatron_mixcpt.convert.stream_write
import megatron_mixcpt.convert.weights  # noqa: F401 (imported before the clock starts)
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.convert.convert import convert
from megatron_mixcpt.convert.export import export
from megatron_mixcpt.huggingface.config import config_dict, load_config
from megatron_mixcpt.huggingface.names import hf_shapes
from megatron_mixcpt.huggingface.tensorfiles import SafetensorsWriter

SHAPE = Architecture(
    num_layers=1,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=64,
    vocab_size=32000,
)
SPEED_AIM = 0.7  # of the copy's rate
MEMORY_AIM = "largest tensor x 3 + 600 MB"


def write_model(folder: Path, gigabytes: float) -> int:
    """A random bf16 Llama of about that size in shards of 256 MB; returns the bytes of its largest tensor."""
    layer = dataclasses.replace(SHAPE, num_layers=2).num_parameters - SHAPE.num_parameters
    arch = dataclasses.replace(SHAPE, num_layers=round((gigabytes * 2**30 / 2 - SHAPE.num_parameters) / layer) + 1)
    shapes = hf_shapes(arch)
    with SafetensorsWriter(folder, shapes, torch.bfloat16, shard_bytes=256 * 2**20) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape, dtype=torch.bfloat16))
    (folder / "config.json").write_text(json.dumps(config_dict(arch) | {"dtype": "bfloat16"}))
    return max(2 * torch.Size(shape).numel() for shape in shapes.values())


def use_pages(path: Path, num_bytes: int) -> None:
    """Leave that much free memory behind which was in use a moment ago."""
    with open(path, "wb") as file:
        for _ in range(0, num_bytes, 2**20):
            file.write(bytes(2**20))
    path.unlink()


def copy(source: Path, out: Path) -> None:
    """Copy the files onto the disk."""
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        with open(out / path.name, "rb") as file:
            os.fsync(file.fileno())


STEPS: dict[str, Callable[[Path, Path], None]] = {"copy": copy, "convert": convert, "export": export}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, source: Path, out: Path) -> dict[str, float]:
    """One step in this process, which has done nothing yet."""
    load_config(out.with_name("hf"))  # transformers imports the rest of itself when it first reads a configuration
    use_pages(out.with_name("pages"), 2 * sum(path.stat().st_size for path in source.iterdir()))
    began, spent = time.perf_counter(), cpu_seconds()
    STEPS[name](source, out)
    seconds, spent = time.perf_counter() - began, cpu_seconds() - spent
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return {"seconds": seconds, "cpu": spent, "peak": 1024.0 * int(found[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    rows: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "hf").mkdir()
        largest = write_model(folder / "hf", args.gigabytes)
        size = sum(path.stat().st_size for path in (folder / "hf").iterdir())
        for _ in range(args.rounds):
            row = {}
            for name, source, made in (("copy", "hf", "copy"), ("convert", "hf", "ckpt"), ("export", "ckpt", "out")):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    row[name] = process.submit(measure, name, folder / source, folder / made).result()
            rows.append(row)
            for made in ("copy", "ckpt", "out"):
                shutil.rmtree(folder / made)
    table = report(rows, size, largest)
    print(table)
    if args.out:
        args.out.write_text(table)


def report(rows: list[dict[str, dict[str, float]]], size: int, largest: int) -> str:
    allowed = 3 * largest + 600 * 2**20
    lines = [
        "# Converting and exporting against copying",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}; "
        f"{size / 2**30:.2f} GB of bf16 weights, largest tensor {largest / 2**20:.0f} MB, {len(rows)} rounds; "
        f"load average {os.getloadavg()[1]:.1f} (above {os.cpu_count()}, other programs took their share).",
        "",
        "| | MB/s | share of the copy's rate | CPU seconds | peak memory MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in ("copy", "convert", "export"):
        rate = statistics.median(size / 2**20 / row[name]["seconds"] for row in rows)
        share = statistics.median(row["copy"]["seconds"] / row[name]["seconds"] for row in rows)
        cpu = statistics.median(row[name]["cpu"] for row in rows)
        peak = max(row[name]["peak"] for row in rows) / 2**20
        lines.append(f"| {name} | {rate:.0f} | {share:.2f} | {cpu:.1f} | {peak:.0f} |")
    both = statistics.median(
        2 * row["copy"]["seconds"] / (row["convert"]["seconds"] + row["export"]["seconds"]) for row in rows
    )
    lines += [
        "",
        f"There and back again: {both:.2f} of the copy's rate.",
        "",
        f"Aims: there and back at least {SPEED_AIM:.0%} of the copy's rate; "
        f"peak at most {MEMORY_AIM} = {allowed / 2**20:.0f} MB.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
