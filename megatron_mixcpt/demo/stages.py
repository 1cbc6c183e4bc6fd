"""Stages that are done once: each leaves a receipt keyed by its settings, and running again skips what has one.

A receipt is written twice. When a stage begins, it records the key alone: output found beside such a receipt was made
by the same settings, so an interrupted stage may continue from it. When the stage ends, it records time and result.
Output without a matching receipt is deleted before the stage runs, so nothing stale is ever built upon.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_mixcpt.demo.console import DemoConsole
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.files import write_json
from megatron_mixcpt.runtime.run_lock import LOCK, RunLock

MARKER = "mixcpt-demo.json"

Progress = Callable[[float, str], None]
"""Called with the finished share of a stage (0 to 1) and a few words about where it stands."""


@dataclass(frozen=True)
class Done:
    """A finished stage. `result` is JSON-serialisable; `seconds` is the time of all its attempts."""

    key: str
    result: Any
    seconds: float


@contextlib.contextmanager
def open_folder(folder: Path, *, fresh: bool) -> Iterator[None]:
    """`folder` is this demo's alone, emptied if `fresh`. Raises ConfigError rather than touch a foreign folder, or one
    in which another demo runs."""
    marker = folder / MARKER
    others = folder.exists() and any(not path.name.startswith(LOCK) for path in folder.iterdir())
    if others and not marker.is_file():
        raise ConfigError(f"{folder} is not empty and was not made by the demo; choose another --out")
    with RunLock(folder):
        for path in folder.iterdir() if fresh else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith(LOCK):
                path.unlink()
        marker.write_text('{"made_by": "python -m megatron_mixcpt.demo"}\n')
        yield


class Stages:
    """Runs the demo's stages in order, skipping those that are done."""

    def __init__(self, folder: Path, console: DemoConsole) -> None:
        self._receipts = folder / "receipts"
        self._receipts.mkdir(parents=True, exist_ok=True)
        self._console = console

    def run(
        self,
        name: str,
        title: str,
        settings: Any,
        outputs: Sequence[Path],
        work: Callable[[Progress], Any],
        after: Sequence[Done] = (),
    ) -> Done:
        """Run `work(progress)`, or return its earlier result if settings and predecessors are unchanged.

        `settings` (JSON-serialisable) and the keys of `after` make the key. `outputs` are the files and folders that
        the stage makes: missing ones make it run again. What `work` returns is kept in the receipt.
        """
        key = xxhash.xxh3_128_hexdigest(json.dumps([settings, [done.key for done in after]], sort_keys=True).encode())
        receipt = self._receipts / f"{name}.json"
        known = _read(receipt)
        if known.get("key") == key and known.get("finished") and all(path.exists() for path in outputs):
            self._console.skipped(name, title)
            return Done(key, known["result"], known["seconds"])
        if known.get("key") != key:
            known = {}
            for path in outputs:
                _remove(path)
        spent = known.get("seconds", 0.0)
        write_json(receipt, {"key": key, "finished": False, "seconds": spent})
        self._console.begin(name, title)
        start = time.monotonic()
        try:
            result = work(self._console.progress)
        except BaseException:
            write_json(receipt, {"key": key, "finished": False, "seconds": spent + time.monotonic() - start})
            raise
        done = Done(key, result, spent + time.monotonic() - start)
        write_json(receipt, {"key": key, "finished": True, "seconds": done.seconds, "result": result})
        self._console.end()
        return done


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # a torn receipt counts as none
        return {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
