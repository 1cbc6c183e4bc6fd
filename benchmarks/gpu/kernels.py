"""The LSSD loss beside its peers (benchmarks/lssd_gpu.py), what says most first."""

from __future__ import annotations

import importlib.util
import os

import torch

from benchmarks.gpu.findings import Findings, LeftOut
from benchmarks.lssd_gpu import copy_bandwidth, linear_table, measure, write_report
from benchmarks.lssd_peers import LOGITS, Contender
from benchmarks.lssd_report import Case, Record, plot

CASES = (
    Case(8192, 128256, "bf16", 1.0, 0),
    Case(8192, 16032, "bf16", 1.0, 0),  # Llama 3's vocabulary over eight ranks
    Case(16384, 49152, "bf16", 1.0, 0),  # SmolLM2
    Case(8192, 128256, "bf16", 2.0, 50),
    Case(8192, 128256, "fp32", 1.0, 0),
    Case(2048, 151936, "bf16", 1.0, 0),
)
SMALL_CASES = (Case(8, 64, "bf16", 1.0, 0), Case(8, 64, "fp32", 2.0, 50))
LINEAR, SMALL_LINEAR = [8192, 4096, 128256], [16, 8, 64]
SLOW_TO_BEGIN = "torch.compile"  # compiles anew for each case


def run(findings: Findings, *, small: bool) -> None:
    device, cases = os.environ["MIXCPT_DEVICE"], SMALL_CASES if small else CASES
    copied = copy_bandwidth(device, 16 if small else 4096)
    first = [contender for contender in LOGITS if contender.name != SLOW_TO_BEGIN]
    last = [] if small else [contender for contender in LOGITS if contender.name == SLOW_TO_BEGIN]
    findings.plan(*(f"{case.label}: {c.name}" for c in first + last for case in cases if _takes(c, case)))
    records: list[Record] = []
    linear = ""
    for case in cases:
        for contender in (c for c in first if _takes(c, case)):
            _try(findings, contender, case, copied, device, records)
    with findings.tried("from hidden states") as values:
        linear = linear_table(SMALL_LINEAR if small else LINEAR, device)
        write_report(findings.folder, records, copied, device, linear)
        values["told"] = "in lssd_gpu.md"
    for case in cases:
        for contender in (c for c in last if _takes(c, case)):
            _try(findings, contender, case, copied, device, records, linear)
    with findings.tried("picture"):
        if importlib.util.find_spec("matplotlib") is None:
            raise LeftOut("matplotlib is not installed")
        plot(records, copied, findings.folder / "lssd_gpu.png")


def _takes(contender: Contender, case: Case) -> bool:
    return (contender.masks or not case.masked) and (contender.any_temperature or case.temperature == 1.0)


def _try(
    findings: Findings,
    contender: Contender,
    case: Case,
    copied: float,
    device: str,
    records: list[Record],
    linear: str = "",
) -> None:
    name = f"{case.label}: {contender.name}"
    with findings.tried(name) as values:
        record = measure(contender, case, device)
        records.append(record)
        records.sort(key=lambda r: (CASES + SMALL_CASES).index(r.case))
        write_report(findings.folder, records, copied, device, linear)
        if record.note:
            raise LeftOut(record.note)
        share = record.bandwidth / copied if record.bandwidth else None
        values |= {"forward ms": record.forward, "both ms": record.both, "share of copy": share}
        values |= {"MiB": record.memory, "loss error": record.loss_error, "gradient error": record.gradient_error}
    if device == "cuda":
        torch.cuda.empty_cache()
