"""Cases computed by the trainer on its ranks, and held against the oracle."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mixcpt.certify.axes import Variant, blamed, variants, whole_run
from megatron_mixcpt.certify.compare import Deviation, Judge
from megatron_mixcpt.certify.observed import read_case
from megatron_mixcpt.certify.problem import STUDENT, Problem
from megatron_mixcpt.certify.subject import CASES, Case
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.runtime.launcher import launch, ranks_of_our_own

Launch = Callable[[Path, int], None]
"""Runs `subject.observe_all(folder)` in so many ranks; raises MixcptError where one fails."""


@dataclass(frozen=True)
class Outcome:
    """Of one dtype.

    Attributes:
        deviations: of everything that was compared.
        cause: what brings in what is off, in words; None where nothing is.
    """

    dtype: str
    deviations: list[Deviation]
    cause: str | None

    @property
    def off(self) -> list[Deviation]:
        return [deviation for deviation in self.deviations if deviation.is_off]


def try_all(problem: Problem, run: Launch) -> list[Outcome]:
    """The run in fp32, where nothing hides behind rounding, and in its own dtype; what is off is traced."""
    dtypes = list(dict.fromkeys(("fp32", problem.values["train"]["dtype"])))
    wholes = [whole_run(problem, dtype) for dtype in dtypes]
    compute(problem, wholes, run)
    found = [(whole, judged(problem, whole)) for whole in wholes]
    outcomes, cause = [], None
    for dtype, (_, deviations) in zip(dtypes, found):
        if any(deviation.is_off for deviation in deviations) and cause is None:
            try:
                cause = trace(problem, dtype, run)
            except MixcptError as error:  # what was found stands
                cause = f"what brings it in could not be found: {error}"
            if dtype != dtypes[0]:
                cause += f", in {dtype} alone"
        outcomes.append(Outcome(dtype, deviations, cause if any(d.is_off for d in deviations) else None))
    return outcomes


def trace(problem: Problem, dtype: str, run: Launch) -> str:
    """What brings in what is off in `dtype`."""
    others = variants(problem, dtype)
    compute(problem, others, run)
    return blamed({other.name: not any(d.is_off for d in judged(problem, other)) for other in others})


def compute(problem: Problem, runs: Sequence[Variant], run: Launch) -> None:
    """Let the trainer compute `runs`, those of many ranks first."""
    if not runs:
        return
    adapter = str(problem.adapter(STUDENT))
    cases = [
        Case(_folder(v), v.values, v.ranks, str(problem.model(STUDENT)), adapter if v.config.adapter else None)
        for v in sorted(runs, key=lambda v: -v.ranks)
    ]
    (problem.folder / CASES).write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    run(problem.folder, cases[0].ranks)


def judged(problem: Problem, variant: Variant) -> list[Deviation]:
    """How far what the ranks computed for `variant` is from the oracle's."""
    steps = read_case(problem.folder / _folder(variant), variant.config, problem.arch)
    return Judge(problem, variant.config).deviations(steps)


def _folder(variant: Variant) -> str:
    return f"{Path(variant.values['run_dir']).name}-{variant.config.train.dtype}"


def on_this_machine(device: str) -> Launch:
    """Ranks on `device`, cpu or cuda, started by the launcher of `--nproc`."""

    def run(folder: Path, ranks: int) -> None:
        with ranks_of_our_own(device):
            code = launch(ranks, [str(folder)], program="megatron_mixcpt.certify.rank")
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        if code != 0:
            raise MixcptError(f"certify: the trainer failed on the small model with exit code {code}: see above")

    return run
