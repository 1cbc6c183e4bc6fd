"""A step of the trainer in bf16, one row of packed tokens: Mix-CPT and cross-entropy alone, many documents and one."""

from __future__ import annotations

import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import workload
from benchmarks.gpu.findings import Findings, reason
from megatron_mixcpt.architecture.architecture import Architecture

RECOMPUTE = ("none", "mlp", "full")  # each where memory does not suffice for the one before


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    document: int
    """Tokens of each."""
    loss: str

    @property
    def name(self) -> str:
        return f"{self.model}, {self.tokens} tokens in documents of {self.document}: {self.loss}"


def cases(small: bool) -> list[Case]:
    models, lengths, packed = (
        (workload.SMALL_MODELS, workload.SMALL_TOKENS, workload.SMALL_PACKED)
        if small
        else (workload.MODELS, workload.TOKENS, workload.PACKED)
    )
    return [
        Case(model, tokens, document, loss)
        for model in models
        for loss in workload.LOSSES
        for tokens in lengths
        for document in (packed, tokens)
    ]


def run(findings: Findings, *, small: bool) -> None:
    left = cases(small)
    findings.plan(*(case.name for case in left))
    with tempfile.TemporaryDirectory() as name:
        for model, arch in {**workload.MODELS, **workload.SMALL_MODELS}.items():
            mine = [case for case in left if case.model == model]
            if not mine:
                continue
            folder = Path(name) / model.replace(" ", "_")
            weights = workload.write_random(arch, folder / "model")
            for loss in workload.LOSSES:
                remaining = [case for case in mine if case.loss == loss]
                for recompute in RECOMPUTE:
                    remaining = _measured(findings, arch, weights, folder, remaining, recompute, small)
                for case in remaining:
                    findings.add(case.name, "left out", "memory does not suffice")


def _measured(
    findings: Findings,
    arch: Architecture,
    weights: Path,
    folder: Path,
    cases: list[Case],
    recompute: str,
    small: bool,
) -> list[Case]:
    """Measure cases of one loss; returns those for which memory did not suffice."""
    if not cases:
        return []
    short, open_ = [], list(cases)
    try:
        sections = workload.LOSSES[cases[0].loss]
        with workload.trainer(arch, weights, folder, recompute, sections) as (step, optimize):
            for case in cases:
                batch = workload.batch(arch, case.tokens, case.document)
                try:
                    values = workload.measured(
                        arch,
                        case.tokens,
                        case.document,
                        lambda batch=batch: step(batch),
                        optimize,
                        teacher=arch if case.loss != "CE only" else None,
                        small=small,
                    )
                    findings.add(case.name, "ok", "" if recompute == "none" else f"recompute {recompute}", **values)
                except torch.OutOfMemoryError:
                    short.append(case)
                open_.remove(case)
                workload.free()
    except torch.OutOfMemoryError:  # of the model itself
        short += open_
    except Exception as error:  # another loss, or model, may work
        traceback.print_exc()
        for case in open_:
            findings.add(case.name, "failed", reason(error))
    return short
