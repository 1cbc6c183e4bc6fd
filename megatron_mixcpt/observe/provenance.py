"""Which code, libraries and surroundings a run had, written at every start that differs from the one before."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_mixcpt
from megatron_mixcpt.files import write_whole

# What changes how a run computes or where; nothing else of the environment, which may hold secrets.
VARIABLES = (
    "CUDA_", "GLOO_", "MASTER_", "MIXCPT_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "SLURM_JOB_", "SLURM_RESTART_COUNT",
    "TORCH_", "TORCHELASTIC_", "TRITON_", "WORLD_SIZE",
)  # fmt: skip
SECRETS = ("TOKEN", "SECRET", "PASSWORD", "KEY")


def record_provenance(folder: Path) -> None:
    """Write `start_NNNN.json` (code version, libraries, machine, variables) into `folder`, and `start_NNNN.diff`, what
    a checkout has changed since its commit; nothing where the last start was the same."""
    folder.mkdir(parents=True, exist_ok=True)
    code, diff = _code()
    record = {
        "code": code,
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not any(word in name for word in SECRETS)
        },
        "packages": _packages(),
    }
    text = json.dumps(record, indent=1)
    starts = sorted(folder.glob("start_*.json"))
    if starts and starts[-1].read_text() == text and _text(starts[-1].with_suffix(".diff")) == diff:
        return
    for number in itertools.count(len(starts) + 1):
        path = folder / f"start_{number:04d}.json"
        with contextlib.suppress(FileExistsError):  # another shard's, which started at the same moment
            path.open("x").close()
            break
    if diff:
        write_whole(path.with_suffix(".diff"), diff)
    write_whole(path, text)


@cache
def _packages() -> list[str]:
    """What is installed, as pip writes it; read once a process, for it takes half a second.

    Of a package that is there twice the version that is imported: the one that comes first on Python's path.
    """
    versions: dict[str, str] = {}
    for package in metadata.distributions():
        versions.setdefault(package.metadata["Name"], package.metadata["Version"])
    return sorted(f"{name}=={version}" for name, version in versions.items())


def _code() -> tuple[dict[str, Any], str]:
    """Version and, in a git checkout, commit and difference to it."""
    package = Path(megatron_mixcpt.__file__).parent
    code: dict[str, Any] = {"version": megatron_mixcpt.__version__, "path": str(package)}
    if not (package.parent / ".git").exists():
        return code, ""
    commit, diff = _git(package.parent, "rev-parse", "HEAD"), _git(package.parent, "diff", "HEAD")
    untracked = _git(package.parent, "ls-files", "--others", "--exclude-standard", "--", "*.py")
    return code | {"commit": commit.strip(), "changed": bool(diff), "untracked": untracked.split()}, diff


def _git(folder: Path, *arguments: str) -> str:
    """Output of git; empty where it is not installed or refuses, for example to look at another user's checkout."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
