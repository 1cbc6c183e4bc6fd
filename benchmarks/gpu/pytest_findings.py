"""A plugin of pytest that makes a finding of every test as it ends; with xdist, in the process that gathers them."""

import os
from pathlib import Path

from benchmarks.gpu.findings import Findings

PART = "kernel_tests"


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _add(report, report.when)


def pytest_collectreport(report):
    """Of a file that cannot be imported, or that skips as a whole."""
    if report.outcome != "passed":
        _add(report, "collection")


def _add(report, phase):
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    findings = Findings(Path(os.environ["MIXCPT_GPU_FINDINGS"]), PART)
    name = report.nodeid.removeprefix("tests/")
    if report.outcome == "skipped":
        findings.add(name, "left out", str(report.longrepr[-1]))
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        # Of a file that cannot be imported there is text alone, whose last line has the error.
        line = crash.message.splitlines()[0] if crash else str(report.longrepr).strip().rpartition("\n")[2]
        findings.add(name, "failed", f"in {phase}: {line[:300]}")
    else:
        findings.add(name, "ok")
