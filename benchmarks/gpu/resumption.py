"""A run that is killed and resumed beside runs that are not, with deterministic kernels and with those of every run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.findings import Findings
from megatron_mixcpt.checkpoint.store import list_checkpoints
from tests.helpers.corpus import write_mix
from tests.train.runs import saved_tensors

MODES = {"deterministic": "benchmarks.gpu.deterministic", "as every run": "megatron_mixcpt.cli"}  # what runs `mixcpt`
RUNS = ("straight", "again", "killed")
APART = 0.05  # of the loss, by which runs may differ without deterministic kernels: a lost sample makes more


def run(findings: Findings, *, small: bool) -> None:
    modes = list(MODES)[-1:] if small else list(MODES)
    findings.plan(*modes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mix = write_mix(folder / "data", seq_length=64, train=64)
        with ThreadPoolExecutor(len(modes)) as pool:
            for mode in modes:
                pool.submit(_try, findings, mode, folder / mode.replace(" ", "_"), mix, small)


def _try(findings: Findings, mode: str, folder: Path, mix: Path, small: bool) -> None:
    with findings.tried(mode) as values, ThreadPoolExecutor(len(RUNS)) as pool:
        folder.mkdir()
        steps, every = (16, 4) if small else (240, 40)
        runs = RUNS if not small else ("straight", "killed")
        others = {run: pool.submit(_train, mode, _written(folder, run, mix, steps, every)) for run in runs[:-1]}
        _kill_after_a_checkpoint(mode, _written(folder, "killed", mix, steps, every), folder / "killed")
        _train(mode, folder / "killed.yaml")
        for other in others.values():
            other.result()
        found = {run: _read(folder / run) for run in runs}
        streams = {run: [row["data/stream"] for row in rows] for run, (rows, _) in found.items()}
        if any(stream != streams["straight"] for stream in streams.values()):
            raise AssertionError("runs saw different data")
        for run in runs[1:]:
            told = "resumed" if run == "killed" else run
            values[f"{told}: loss apart"] = apart = _apart(found["straight"][0], found[run][0])
            values[f"{told}: tensors that differ"] = differ = _differing(found["straight"][1], found[run][1])
            if mode == "deterministic" and differ:
                raise AssertionError(
                    f"{told}: {differ} of {len(found['straight'][1])} tensors of the checkpoint differ"
                )
            if apart > APART:
                raise AssertionError(f"{told}: losses are {apart:.3g} apart")


def _written(folder: Path, run: str, mix: Path, steps: int, every: int) -> Path:
    configuration: dict[str, Any] = {
        "model": {"preset": "tiny"},
        "data": {"mix": str(mix)},
        "train": {"steps": steps, "micro_batch_size": 2, "global_batch_size": 4, "lr": 1e-3, "spike_sigmas": 0},
        "checkpoint": {"every": every, "keep": 2},
        "run_dir": str(folder / run),
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return path


def _command(mode: str, path: Path) -> list[str]:
    return [sys.executable, "-m", MODES[mode], "train", str(path)]


def _train(mode: str, path: Path) -> None:
    done = subprocess.run(
        _command(mode, path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        print(f"---- {mode}: {path.name}\n{done.stdout}", flush=True)
        last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{path.stem}: exit code {done.returncode}: {' '.join(last)[:300]}")


def _kill_after_a_checkpoint(mode: str, path: Path, run: Path) -> None:
    with (run.parent / "killed.log").open("wb") as log:
        process = subprocess.Popen(_command(mode, path), stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and not list_checkpoints(run / "checkpoints"):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
    if code != -signal.SIGKILL:
        print(f"---- {mode}: {path.name}\n{(run.parent / 'killed.log').read_text()}", flush=True)
        raise RuntimeError(f"the run that was to be killed had ended with exit code {code}")


def _read(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """(the row of each step, the newest checkpoint's tensors)."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines) if "data/stream" in row}
    return [rows[step] for step in sorted(rows)], saved_tensors(list_checkpoints(run / "checkpoints")[0])


def _apart(expected: list[dict[str, Any]], rows: list[dict[str, Any]]) -> float:
    """Largest difference of the losses, as a share of the loss."""
    return max(abs(a["train/loss"] - b["train/loss"]) / a["train/loss"] for a, b in zip(expected, rows))


def _differing(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> int:
    names = expected.keys() | found.keys()
    return sum(
        name not in expected or name not in found or not torch.equal(expected[name], found[name]) for name in names
    )
