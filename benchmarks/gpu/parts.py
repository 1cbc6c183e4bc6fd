"""The parts, the most valuable first, and their shares of the time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TOTAL_SECONDS = 540.0


@dataclass(frozen=True)
class Part:
    """`run(findings, small)` of the module of this package that has its name.

    Attributes:
        seconds: its share; what the parts before it have not used is added.
    """

    name: str
    seconds: float
    about: str


PARTS = (
    Part("machine", 35, "doctor, versions, and what the device reaches by itself"),
    Part("kernel_tests", 95, "the tests that are marked gpu"),
    Part("certification", 110, "mixcpt certify for teachers, adapters, losses, families and recomputation"),
    Part("resumption", 65, "killed and resumed, with deterministic kernels and without"),
    Part("kernels", 75, "the loss beside its peers, with bandwidth"),
    Part("training", 60, "a step of the trainer: speed, MFU, memory"),
    Part("profiling", 35, "one step under torch's profiler: kernels and waits"),
    Part("peers", 65, "the same step by transformers"),
)


def in_all(parts: Sequence[Part]) -> list[Part]:
    """With shares that are the whole time together."""
    factor = TOTAL_SECONDS / sum(part.seconds for part in parts)
    return [replace(part, seconds=factor * part.seconds) for part in parts]


def command_of(part: Part, folder: Path, small: bool) -> Sequence[str]:
    """What runs `part` in a process of its own."""
    return [sys.executable, "-m", "benchmarks.gpu.part", part.name, str(folder), *["--small"] * small]
