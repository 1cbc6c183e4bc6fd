"""How long saving stops training, in the foreground and behind it, what hashing costs, and what four ranks each do.

One process and a model of 50 M parameters, foreground and background saves in turn; four ranks and one of 8 M, this
version and, with `--before DIR`, the version checked out in DIR in turn. So the ratios hold on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_mixcpt.checkpoint import Saver
from megatron_mixcpt.checkpoint.manifest import find_damage
from megatron_mixcpt.checkpoint.store import list_checkpoints, size_of
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.runtime.launcher import free_port
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.train.optimizer import optimizer_step
from megatron_mixcpt.train.setup import Components, build
from tests.helpers.corpus import write_mix

SEQ_LENGTH, VOCAB = 128, 30000
RANKS, RANKS_VOCAB = 4, 60000


def step(components: Components, config: Config, number: int) -> float:
    began = time.monotonic()
    components.model.zero_grad_buffer()
    components.optimizer.zero_grad()
    components.run([components.task.fullest_batch(1)])
    optimizer_step(components.optimizer, number, config.train)
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
        components = build(config, state)
        taken: dict[str, list[float]] = {name: [] for name in ("step", "foreground", "blocked", "during", "verify")}
        savers = [Saver(folder / "checkpoints", keep=1, background=background) for background in (False, True)]
        number = 0
        for _ in range(rounds):
            for background in (False, True):
                for _ in range(2):
                    taken["step"].append(step(components, config, number))
                    number += 1
                saver = savers[background]
                saver.begin(number, components.model, components.optimizer)
                outcome = None
                while background and (outcome := saver.poll()) is None:
                    taken["during"].append(step(components, config, number))
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


def measure_ranks(folder: Path, trees: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    """By version and measure: a value for each round, of the rank that does most (of bytes, also of all ranks)."""
    values = {
        "model": {"preset": "tiny"},
        "train": {"steps": 10, "dtype": "bf16", "distributed_optimizer": True, "global_batch_size": RANKS},
        "loss": {"target": "none"},
        "teacher": {"source": "none"},
        "run_dir": str(folder / "ranks-run"),
    }
    for version, tree in trees.items():  # each reads the format of its own time
        data, config = folder / f"{version}-data", folder / f"{version}.json"
        code = f"write_mix(Path({str(data)!r}), seq_length={SEQ_LENGTH}, vocab_size={RANKS_VOCAB})"
        code = f"from pathlib import Path; from tests.helpers.corpus import write_mix; {code}"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)})
        config.write_text(json.dumps(values | {"data": {"mix": str(data / "mix.json")}}))
    taken: dict[str, dict[str, list[float]]] = {version: {} for version in trees}
    for number in range(rounds):
        for version, tree in trees.items():
            out = folder / f"{version}-{number}"
            out.mkdir()
            found = run_ranks(tree, folder / f"{version}.json", out)
            for name in ("foreground 2", "background 1", "background 2", "resume"):
                for measure in found[0][name]:
                    row = [of_rank[name][measure] for of_rank in found]
                    taken[version].setdefault(f"{name} {measure}", []).append(max(row))
                    taken[version].setdefault(f"{name} {measure} of all", []).append(sum(row))
            shutil.rmtree(out)
    return taken


def run_ranks(tree: Path, config: Path, out: Path) -> list[dict]:
    """Four ranks of benchmarks/checkpoint_ranks.py with the package in `tree`; what each measured."""
    program = Path(__file__).with_name("checkpoint_ranks.py")
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(RANKS),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(config), str(out)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tree,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    errors = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(errors))
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


def report_ranks(taken: dict[str, dict[str, list[float]]]) -> str:
    median = {version: {key: statistics.median(row) for key, row in of.items()} for version, of in taken.items()}
    versions = list(median)

    def row(label: str, key: str, show: Callable[[float], str]) -> str:
        cells = [show(median[version][key]) for version in versions]
        ratio = f" {median[versions[-1]][key] / median[versions[0]][key]:.2f} |" if len(versions) == 2 else ""
        return f"| {label} | " + " | ".join(cells) + f" |{ratio}"

    def mb(value: float) -> str:
        return f"{value / 1e6:.0f} MB"

    def seconds(value: float) -> str:
        return f"{value:.2f} s"

    head = ["", *versions, *(["ratio"] if len(versions) == 2 else [])]
    return "\n".join(
        [
            f"## {RANKS} ranks, data-parallel, bf16, distributed optimizer",
            "",
            "The rank that does most; medians. Seconds are those of a busy machine: their ratios are what counts.",
            "",
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
            row("bytes written by a rank", "foreground 2 written", mb),
            row("bytes written by all", "foreground 2 written of all", mb),
            row("training stands still, foreground save", "foreground 2 standstill", seconds),
            row("training stands still, background save", "background 2 standstill", seconds),
            row("memory a foreground save takes on a rank", "foreground 2 memory", mb),
            row("memory a background save takes on a rank", "background 1 memory", mb),
            row("bytes read by a rank to resume, after verification", "resume read", mb),
            row("bytes read by all", "resume read of all", mb),
            row("memory a resume takes on a rank", "resume memory", mb),
            row("resume, after verification", "resume seconds", seconds),
            "",
        ]
    )


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
    parser.add_argument("--before", type=Path, metavar="DIR", help="checkout of the version to compare with")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint_cpu.md"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trees = {"before": args.before.resolve()} if args.before else {}
        ranks = measure_ranks(Path(folder), {**trees, "now": Path(__file__).parents[1]}, args.rounds)
        text = report(measure(Path(folder), args.rounds), hash_rate()) + "\n" + report_ranks(ranks)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)


if __name__ == "__main__":
    main()
