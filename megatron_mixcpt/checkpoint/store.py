"""Checkpoint directories: written under a temporary name, renamed when complete, listed newest first.

A checkpoint is `<parent>/step_<N>/`: the sharded state in megatron-core's distributed format, and `checkpoint.json`
with everything a reader needs before it opens that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from megatron_mixcpt.errors import VerificationError

INFO = "checkpoint.json"
FORMAT = "mixcpt-checkpoint/1"  # INFO says so
_NAME = re.compile(r"step_(\d+)")


def new_directory(parent: Path, step: int) -> Path:
    """A fresh temporary directory in which to write the checkpoint of `step`. Rank 0 only."""
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob("step_*.tmp.*"):  # left by a run that died while saving
        shutil.rmtree(stale, ignore_errors=True)
    path = parent / f"step_{step:08d}.tmp.{uuid.uuid4().hex[:8]}"
    path.mkdir()
    return path


def commit(temporary: Path, info: dict[str, Any], keep: int | None) -> Path:
    """Make a finished checkpoint visible under its final name, then remove all but the newest `keep`. Rank 0 only."""
    (temporary / INFO).write_text(json.dumps(info, indent=2))
    _sync(temporary)
    final = temporary.with_name(temporary.name.split(".tmp.")[0])
    if final.exists():  # the same step saved again, after a resume
        replaced = final.with_name(f"{final.name}.tmp.replaced")
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    _sync(final.parent)
    if keep is not None:
        for old in list_checkpoints(final.parent)[keep:]:
            shutil.rmtree(old)
    return final


def list_checkpoints(parent: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if _NAME.fullmatch(path.name) and (path / INFO).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, or the newest one of a run directory. Raises VerificationError."""
    if (path / INFO).is_file():
        return path
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise VerificationError(f"{path}: neither a checkpoint nor a run directory with a complete checkpoint")
    return found[0]


def read_info(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's description: architecture, step, data fingerprint and so on."""
    try:
        return json.loads((checkpoint / INFO).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise VerificationError(f"{checkpoint / INFO}: cannot be read: {error}") from None


def _sync(path: Path) -> None:
    """Flush a directory (and the files directly in it) to disk."""
    for entry in [*(p for p in path.iterdir() if p.is_file()), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
