"""What the parts find, written as it comes: a line of results.jsonl for everything that is tried."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FILE_NAME = "results.jsonl"
State = Literal["planned", "ok", "failed", "left out"]


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        told: what is worth a sentence, first of all why it failed or was left out.
        values: what was measured, by the name of its column.
    """

    part: str
    name: str
    state: State
    told: str = ""
    values: dict[str, Any] = field(default_factory=dict)


class LeftOut(Exception):
    """What cannot be tried here, and why."""


class Findings:
    """Those of one part. Several processes may write at once."""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self._part = folder, part

    def plan(self, *names: str) -> None:
        """What is going to be tried: the summary names what was not reached."""
        for name in names:
            self.add(name, "planned")

    def add(self, name: str, state: State, told: str = "", **values: Any) -> None:
        line = json.dumps(asdict(Finding(self._part, name, state, told, values))) + "\n"
        descriptor = os.open(self.folder / FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())  # in one call: lines of several processes do not mix
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def tried(self, name: str) -> Iterator[dict[str, Any]]:
        """A finding of this name: ok with the values that are put into what it yields ("told" apart), or failed."""
        values: dict[str, Any] = {}
        try:
            yield values
        except LeftOut as why:
            self.add(name, "left out", str(why))
        except Exception as error:  # what comes after may work
            traceback.print_exc()
            self.add(name, "failed", reason(error))
        else:
            self.add(name, "ok", values.pop("told", ""), **values)


def reason(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def read_findings(folder: Path) -> list[Finding]:
    """The last of each name, in the order in which they were first named; a line that was cut off is none."""
    found: dict[tuple[str, str], Finding] = {}
    path = folder / FILE_NAME
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            finding = Finding(**json.loads(line))
            found[finding.part, finding.name] = finding
    return list(found.values())
