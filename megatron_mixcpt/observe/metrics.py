"""`metrics.jsonl`: one JSON object a line, always written, never rewritten but for steps that a resume repeats."""

from __future__ import annotations

import contextlib
import json
import sys
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_mixcpt.files import write_whole


def finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """With None in place of numbers that are not finite, for which JSON has no word."""
    return {
        name: None if isinstance(value, float) and not isfinite(value) else value for name, value in metrics.items()
    }


class MetricsFile:
    """Appends rows to `path`; rows of steps beyond `resume_step`, from a run that died later, are dropped first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while writing it
                if row["step"] <= resume_step:
                    kept.append(line)
        write_whole(path, "".join(f"{line}\n" for line in kept))
        self._path, self._file = path, path.open("ab", buffering=0)
        self._unwritten = b""
        self._full = False

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a row. A full disk does not end training: rows wait in memory until there is room."""
        self._unwritten += json.dumps({"step": step, **metrics}).encode() + b"\n"
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
            self._full = False
        except OSError as error:
            if not self._full:
                with contextlib.suppress(OSError):  # it may be the same disk
                    print(f"warning: {self._path} cannot be written, its rows wait in memory: {error}", file=sys.stderr)
            self._full = True

    def close(self) -> None:
        self._file.close()
