"""The tests that are marked gpu, each a finding."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from benchmarks.gpu.findings import Findings, read_findings
from benchmarks.gpu.pytest_findings import PART

WHERE = ("tests/gpu", "tests/kernels")
SMALL = ("tests/kernels/test_arguments.py",)  # of which none needs a GPU
WORKERS = 6  # most of the time goes into compiling kernels, on the CPU
FINDINGS = "MIXCPT_GPU_FINDINGS"  # folder, for pytest_findings.py


def run(findings: Findings, *, small: bool) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise SystemExit("pytest is not installed: `make install`, or --wheels (docs/gpu.md has the list)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.pytest_findings", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *([] if small else ["-m", "gpu"])]
    if importlib.util.find_spec("xdist") and not small:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    # What a pytest that started this one has set (its worker's name) is not for ours.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**own, FINDINGS: str(findings.folder)}
    code = subprocess.run([*command, *(SMALL if small else WHERE)], env=environment, check=False).returncode
    # 1: tests failed, which are findings themselves.
    failed = any(found.part == PART and found.state == "failed" for found in read_findings(findings.folder))
    if code not in (0, 1) or (code == 1 and not failed):
        raise SystemExit(f"pytest ended with exit code {code}")
