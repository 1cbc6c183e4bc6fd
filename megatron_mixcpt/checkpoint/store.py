"""Checkpoint directories: written under a temporary name, renamed when complete, kept or removed.

    checkpoints/
      step_00000020/         a complete checkpoint: sharded state, checkpoint.json, manifest.json
      step_00000040.tmp.1f/  being written, or left by a run that died; removed by the next save
      step_00000030.bad.07/  set aside because it did not verify
      latest.json            name of the newest complete checkpoint, for other programs; at the end of a run with a
                             forgetting budget, of its result

A name without suffix appears by one rename, after every file under it is on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_mixcpt.checkpoint.info import INFO, CheckpointInfo, read_info, render_info
from megatron_mixcpt.checkpoint.manifest import Entry, write_manifest
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.files import sync, write_json

LATEST = "latest.json"
_NAME = re.compile(r"step_(\d+)")


def new_directory(parent: Path, step: int) -> Path:
    """A fresh temporary directory in which to write the checkpoint of `step`; leftovers of dead runs go. One rank."""
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"step_{step:08d}"
    if final.exists():
        raise MixcptError(f"{final} exists already; a checkpoint is never overwritten")
    for stale in parent.glob("step_*.tmp.*"):
        shutil.rmtree(stale, ignore_errors=True)
    path = _suffixed(final, "tmp")
    path.mkdir()
    return path


def commit(temporary: Path, info: CheckpointInfo, known: dict[str, Entry] | None = None) -> Path:
    """Describe a finished checkpoint and make it visible under its final name, durably. One rank.

    Args:
        known: see `write_manifest`.
    """
    seal(temporary, info, known)
    final = temporary.with_name(temporary.name.split(".tmp.")[0])
    temporary.rename(final)
    sync(final.parent)
    _name_latest(final.parent, {"checkpoint": final.name, "step": step_of(final)})
    return final


def choose_result(parent: Path, result: Path, described: dict[str, Any]) -> None:
    """Let latest.json name a checkpoint of the run, and `described` say why, until another is saved. One rank."""
    name = os.path.relpath(result, parent)
    _name_latest(parent, {"checkpoint": name, "step": step_of(result), "result": described})


def result_of(parent: Path) -> Path | None:
    """The checkpoint that `choose_result` chose; None where none was, or it is gone."""
    try:
        latest = json.loads((parent / LATEST).read_text())
        chosen = Path(os.path.normpath(parent / latest["checkpoint"])) if "result" in latest else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return chosen if chosen is not None and is_checkpoint(chosen) else None


def result_step(parent: Path) -> int | None:
    """Step of the checkpoint that is the result of a forgetting budget, or would be if training ended now; None where
    there is none among those in `parent`."""
    if result := result_of(parent):
        return step_of(result) if result.parent == parent else None
    newest = next(iter(list_checkpoints(parent)), None)
    training = read_info(newest).training if newest else None
    return training.forget["controller"]["best_step"] if training and training.forget else None


def result_described(parent: Path) -> dict[str, Any]:
    """What `choose_result` was told of the result; empty where there is none."""
    return json.loads((parent / LATEST).read_text())["result"] if result_of(parent) else {}


def _name_latest(parent: Path, content: dict[str, Any]) -> None:
    write_json(parent / LATEST, content)
    sync(parent)


def seal(folder: Path, info: CheckpointInfo, known: dict[str, Entry] | None = None) -> None:
    """Write checkpoint.json and manifest.json into a folder of finished files, and flush all of them to disk."""
    content = render_info(info)
    (folder / INFO).write_text(json.dumps(content, indent=2))
    write_manifest(folder, content, known)
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def prune(
    parent: Path,
    keep: int,
    keep_every: int = 0,
    spared: int | None = None,
    *,
    remove: Callable[[Path], object] = shutil.rmtree,
) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every`-th step; returns the removed.

    That of step `spared` is kept too. `remove` deletes a folder that no loader looks at any more, now or later.
    """
    removed = []
    for old in list_checkpoints(parent)[keep:]:
        if step_of(old) == spared or (keep_every and step_of(old) % keep_every == 0):
            continue
        doomed = old.rename(_suffixed(old, "tmp"))  # so that a kill here leaves no half of a checkpoint behind
        remove(doomed)
        removed.append(old)
    return removed


def quarantine(checkpoint: Path) -> Path:
    """Set a damaged checkpoint aside; returns its new name."""
    return checkpoint.rename(_suffixed(checkpoint, "bad"))


def list_checkpoints(parent: Path) -> list[Path]:
    """Checkpoints by name, newest first. Whether they are whole, `find_damage` tells."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def list_quarantined(parent: Path) -> list[Path]:
    return sorted(parent.glob("step_*.bad.*")) if parent.is_dir() else []


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def is_checkpoint(path: Path) -> bool:
    return (path / INFO).is_file()


def size_of(checkpoint: Path) -> int:
    """Bytes on disk; of one that is being removed, what is left."""
    size = 0
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(folder, name)).st_size
    return size


def require_space(parent: Path, needed: int) -> None:
    """Raise MixcptError unless `needed` bytes are free where `parent` is."""
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise MixcptError(
            f"{parent}: a checkpoint needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free: "
            "free some space, lower checkpoint.keep, or set another run_dir"
        )


def describe(damage: Sequence[str], limit: int = 3) -> str:
    """The first lines of what `find_damage` found."""
    more = f"; and {len(damage) - limit} more" if len(damage) > limit else ""
    return "; ".join(damage[:limit]) + more


def _suffixed(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}.{uuid.uuid4().hex[:8]}")
