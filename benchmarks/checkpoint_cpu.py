"""How long saving stops training, in the foreground and behind it, and what hashing costs.

One process, a 20 M parameter model; foreground and background saves in turn, so that the ratios hold on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

import torch
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_mixcpt.checkpoint import Saver
from megatron_mixcpt.checkpoint.manifest import find_damage
from megatron_mixcpt.checkpoint.store import list_checkpoints, size_of
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.train.optimizer import optimizer_step
from megatron_mixcpt.train.setup import Parts, build
from tests.helpers.corpus import write_mix

SEQ_LENGTH, VOCAB = 128, 30000


def step(parts: Parts, config: Config, number: int) -> float:
    began = time.monotonic()
    parts.model.zero_grad_buffer()
    parts.optimizer.zero_grad()
    parts.run([parts.task.fullest_batch(1)])
    optimizer_step(parts.optimizer, number, config.train)
    return time.monotonic() - began


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    mix = write_mix(folder / "data", seq_length=SEQ_LENGTH, vocab_size=VOCAB)
    values = {
        "model": {"preset": "small"},
        "data": {"mix": str(mix)},
        "train": {"steps": 10_000, "dtype": "fp32"},
        "loss": {"target": "none"},
        "teacher": {"source": "none"},
        "run_dir": str(folder / "run"),
    }
    config = validate(Config, values, "benchmark")
    with parallel_context() as state:
        parts = build(config, state)
        taken: dict[str, list[float]] = {name: [] for name in ("step", "foreground", "blocked", "during", "verify")}
        savers = [Saver(folder / "checkpoints", keep=1, background=background) for background in (False, True)]
        number = 0
        for _ in range(rounds):
            for background in (False, True):
                for _ in range(2):
                    taken["step"].append(step(parts, config, number))
                    number += 1
                saver = savers[background]
                saver.begin(number, parts.model, parts.arch, parts.optimizer)
                outcome = None
                while background and (outcome := saver.poll()) is None:
                    taken["during"].append(step(parts, config, number))
                    number += 1
                outcome = outcome or saver.finish()
                assert outcome is not None and outcome.path is not None, outcome
                taken["blocked" if background else "foreground"].append(outcome.blocked)
            began = time.monotonic()
            (checkpoint,) = list_checkpoints(folder / "checkpoints")
            assert find_damage(checkpoint) == []
            taken["verify"].append(time.monotonic() - began)
        taken["bytes"] = [float(size_of(checkpoint))]
    return taken


def hash_rate(seconds: float = 1.0) -> float:
    """Bytes a second of one core."""
    block, began, count = os.urandom(256 << 20), time.process_time(), 0
    state = xxhash.xxh3_128()
    while time.process_time() - began < seconds:
        state.update(block)
        count += len(block)
    return count / (time.process_time() - began)


def report(taken: dict[str, list[float]], rate: float) -> str:
    median = {name: statistics.median(values) for name, values in taken.items() if values}
    size = median["bytes"]
    share = median["blocked"] / median["foreground"]
    return f"""# Saving on CPU

`python benchmarks/checkpoint_cpu.py`: a checkpoint of {size / 1e6:.0f} MB from one process; medians.

| | |
|---|---|
| training stands still, foreground save | {median["foreground"]:.2f} s |
| training stands still, background save (`checkpoint.async: true`) | {median["blocked"]:.2f} s, {share:.0%} |
| a step while a save is written behind it | {median["during"] / median["step"]:.2f} x a step without |
| xxh3-128, one core | {rate / 1e9:.1f} GB/s: {size / rate / median["foreground"]:.1%} of the foreground save |
| verifying all bytes before loading, from the page cache | {size / median["verify"] / 1e9:.1f} GB/s |

Measured {date.today()} on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python
{platform.python_version()}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint_cpu.md"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = report(measure(Path(folder), args.rounds), hash_rate())
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)


if __name__ == "__main__":
    main()
