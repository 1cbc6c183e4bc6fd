"""What there is: the doctor's findings, versions, and how fast the device copies and multiplies by itself."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.findings import Findings

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "numpy", "deepspeed", "transformer-engine", "apex")


def run(findings: Findings, *, small: bool) -> None:
    device = os.environ["MIXCPT_DEVICE"]
    findings.plan("copy", "product")
    findings.add("versions", "ok", _versions())
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["nvidia-smi"], check=False, timeout=10)  # into the log
    from megatron_mixcpt.doctor.checks import examine

    for topic, finding in examine(Path.cwd()):
        findings.add(topic, "failed" if finding.level == "problem" else "ok", finding.text)
    import torch

    from benchmarks.lssd_gpu import copy_bandwidth, milliseconds

    with findings.tried("copy") as values:
        values["GB/s"] = copy_bandwidth(device, 16 if small else 4096)
        values["told"] = "read and written"
    with findings.tried("product") as values:
        size = 256 if small else 8192
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        values["TFLOP/s"] = 2e-9 * size**3 / milliseconds(lambda: a @ b, device)
        values["told"] = f"{size} x {size} x {size}, bf16, random"


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
