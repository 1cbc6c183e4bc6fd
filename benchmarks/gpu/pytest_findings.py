"""A plugin of pytest that makes a finding of every test as it ends; with xdist, in the process that gathers them."""

import os
from pathlib import Path

from benchmarks.gpu.findings import Findings

PART = "kernel_tests"


def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" in os.environ or not (report.when == "call" or report.outcome != "passed"):
        return
    findings = Findings(Path(os.environ["MIXCPT_GPU_FINDINGS"]), PART)
    name = report.nodeid.removeprefix("tests/")
    if report.outcome == "skipped":
        findings.add(name, "left out", str(report.longrepr[-1]))
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        findings.add(name, "failed", crash.message.splitlines()[0][:300] if crash else f"in {report.when}")
    else:
        findings.add(name, "ok")
