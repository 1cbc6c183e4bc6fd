"""A forgetting budget against a sweep of fixed distillation weights on SmolLM2-135M: learned against forgotten.

    python -m benchmarks.forget_cpu [--work work/forget] [--out benchmarks/results/forget_cpu.md]

The model learns invented facts (the demo's people); what it forgets is measured on general prose that nobody trains
on. Each point is an ordinary run of `mixcpt train` in the work folder: what has finished is not run again, what was
stopped goes on. The report is written after each point. All runs share data, seed, learning rate and steps; needs what
`make demo` needs.
"""

import argparse
import itertools
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import megatron_mixcpt
from benchmarks.train_cpu import cpu_name
from megatron_mixcpt.demo.base_model import save_smollm2
from megatron_mixcpt.demo.commands import run_mixcpt
from megatron_mixcpt.demo.settings import SMOLLM2
from megatron_mixcpt.demo.texts import write_texts
from megatron_mixcpt.evaluate.loading import quiet_libraries
from megatron_mixcpt.files import write_whole

WEIGHTS = (1.0, 4.0, 16.0, 0.25)
BUDGETS = (0.1, 0.2, 0.05)
STEPS, EVERY, SEQ_LENGTH, LR = 16, 4, 256, 3e-4
HELD_OUT = 8  # sequences of a source that are measured


@dataclass(frozen=True)
class Point:
    """What one measurement of a run found: nats a token, over what the base model had."""

    step: int
    forgotten: float
    learned: float


@dataclass(frozen=True)
class Run:
    """One run of the benchmark: with a fixed `weight`, or with a `budget`."""

    name: str
    weight: float
    budget: float | None = None

    def config(self, folder: Path) -> dict:
        forget = {"forget": {"budget": self.budget, "on": ["prose"], "every": EVERY}} if self.budget else {}
        return forget | {
            "model": {"hf": str(folder / "base")},
            "data": {"mix": str(folder / "data/mix.json"), "seq_length": SEQ_LENGTH},
            "train": {
                "steps": STEPS, "micro_batch_size": 1, "global_batch_size": 1, "lr": LR, "warmup_steps": 4,
                "schedule": "cosine", "weight_decay": 0.0, "seed": SMOLLM2.seed, "dtype": "fp32",
            },
            "loss": {"target": "plain", "kd_weight": self.weight},
            "eval": {"every": 2 * EVERY, "max_samples": HELD_OUT},
            "checkpoint": {"every": 0, "every_minutes": 0, "keep": 1},
            "run_dir": str(folder / self.name),
        }  # fmt: skip

    def is_done(self, folder: Path) -> bool:
        return (folder / self.name / "done").exists()

    def points(self, folder: Path) -> list[Point]:
        """All measurements after the first, which is that of the base model."""
        rows = [json.loads(line) for line in (folder / self.name / "metrics.jsonl").read_text().splitlines()]
        deltas = ("forget/prose/delta", "forget/facts/delta")
        measured = {row["step"]: [row[name] for name in deltas] for row in rows if deltas[0] in row and row["step"]}
        return [Point(step, forgotten, -rise) for step, (forgotten, rise) in sorted(measured.items())]

    def result(self, folder: Path) -> Point:
        """Of a run with a budget what it chose, of another its end."""
        points = self.points(folder)
        latest = json.loads((folder / self.name / "checkpoints/latest.json").read_text())
        step = int(latest["checkpoint"].split("_")[-1]) if self.budget else points[-1].step
        return next(point for point in points if point.step == step)


RUNS = [*(Run(f"weight-{w:g}", w) for w in WEIGHTS), *(Run(f"budget-{b:g}", 1.0, b) for b in BUDGETS)]


def prepare(folder: Path, threads: int) -> None:
    """Texts, base model and mixture, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "data/mix.json").is_file():
        return
    write_texts(SMOLLM2, folder / "texts")
    if not (folder / "base/model.safetensors").is_file():
        save_smollm2(folder / "base")
    texts = folder / "texts"
    facts = {"name": "facts", "kind": "domain", "paths": [str(texts / "domain.jsonl")], "text": "{text}"}
    prose = {"name": "prose", "kind": "general", "heldout": [str(texts / "heldout/general.jsonl")], "text": "{text}"}
    sources = [facts | {"heldout": [str(texts / "heldout/domain.jsonl")], "weight": 1.0}, prose]
    config = {"tokenizer": str(folder / "base"), "out": str(folder / "data"), "seq_length": SEQ_LENGTH}
    path = folder / "preprocess.yaml"
    path.write_text(json.dumps(config | {"valid_fraction": 0, "sources": sources}))  # JSON is YAML
    run_mixcpt(["preprocess", str(path)], folder / "log.txt", threads=threads)


def front_at(forgotten: float, points: list[Point]) -> float:
    """What the sweep learns for so much forgetting, on lines from the origin along its points that are not beaten."""
    best = [Point(0, 0.0, 0.0)]
    for point in sorted(points, key=lambda point: point.forgotten):
        if point.learned > best[-1].learned:
            best.append(point)
    for low, high in itertools.pairwise(best):
        if forgotten <= high.forgotten:
            share = (forgotten - low.forgotten) / max(high.forgotten - low.forgotten, 1e-9)
            return low.learned + max(share, 0.0) * (high.learned - low.learned)
    return best[-1].learned


def best_within(budget: float, points: Iterable[Point]) -> str:
    """The most that was learned with no more than `budget` forgotten."""
    within = [point.learned for point in points if point.forgotten <= budget]
    return f"{max(within):.3f}" if within else "none"


def report(folder: Path, threads: int) -> str:
    """Of the runs that have finished."""
    results = {run: run.result(folder) for run in RUNS if run.is_done(folder)}
    sweep = {run: point for run, point in results.items() if run.budget is None}
    kept = {run: point for run, point in results.items() if run.budget is not None}
    fixed = [
        f"| {run.weight:g} | {point.forgotten:.3f} | {point.learned:.3f} |"
        for run, point in sorted(sweep.items(), key=lambda entry: entry[0].weight)
    ]
    chosen = []
    for run, point in sorted(kept.items(), key=lambda entry: entry[0].budget):
        ends = best_within(run.budget, sweep.values())
        stopped = best_within(run.budget, [other for fixed in sweep for other in fixed.points(folder)])
        front = f"{front_at(point.forgotten, list(sweep.values())):.3f}" if sweep else "none"
        most = max(other.forgotten for other in run.points(folder))
        chosen.append(
            f"| {run.budget:g} | {point.step} | {point.forgotten:.3f} | {point.learned:.3f} | {most:.3f} | {ends} |"
            f" {stopped} | {front} |"
        )
    courses = [
        f"| {run.name} | {', '.join(f'{p.step}: {p.forgotten:+.3f}, {p.learned:.3f}' for p in run.points(folder))} |"
        for run in results
    ]
    return f"""# A forgetting budget against a sweep

`python -m benchmarks.forget_cpu`: SmolLM2-135M-Instruct (4-bit weights, dequantised) learns {SMOLLM2.num_people}
invented people in {STEPS} steps of {SEQ_LENGTH} tokens, self-distillation from the plain teacher, lr {LR:g}, cosine,
fp32, {threads} thread(s). Forgotten: rise of the held-out loss of general prose ({HELD_OUT} sequences of it).
Learned: fall of the held-out loss of the facts in other words. Both in nats a token. One seed.

Sweep, one run a point, at its end:

| kd_weight | forgotten | learned |
|---:|---:|---:|
{chr(10).join(fixed)}

Budget, one run each, measured every {EVERY} steps. The checkpoint that it chose, the most that was forgotten on the
way, and what the sweep learned: within the budget at the end of a run, within it at any measurement, and on its front
(ends) at as much forgetting:

| budget | step | forgotten | learned | most forgotten | sweep within it | at any measurement | sweep's front |
|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(chosen)}

Each line of the sweep is a run, which has to be made before anybody knows what it forgets; a budget is one run. The
sweep that keeps its measurements on the way and stops early is the harder rival.

All measurements (step: forgotten, learned):

| run | |
|---|---|
{chr(10).join(courses)}

Measured {date.today()} on {cpu_name()}, megatron-mixcpt {megatron_mixcpt.__version__}, Python
{platform.python_version()}. Not run yet: {", ".join(run.name for run in RUNS if run not in results) or "none"}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work/forget"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/forget_cpu.md"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], help="some of the runs")
    args = parser.parse_args()
    quiet_libraries()
    prepare(args.work, args.threads)
    for run in RUNS:
        if args.only and run.name not in args.only:
            continue
        path = args.work / f"{run.name}.yaml"
        if not run.is_done(args.work):
            path.write_text(json.dumps(run.config(args.work)))
            run_mixcpt(["train", str(path)], args.work / "log.txt", threads=args.threads)
            (args.work / run.name / "done").touch()
        print(run.name, run.result(args.work), flush=True)
        write_whole(args.out, report(args.work, args.threads))


if __name__ == "__main__":
    main()
