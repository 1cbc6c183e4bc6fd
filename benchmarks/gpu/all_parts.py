"""One part after the other, each within its time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.findings import read_findings
from benchmarks.gpu.parts import Part
from benchmarks.gpu.processes import ENDING_SECONDS, Ended, run_within
from benchmarks.gpu.summary import PartEnded, write_summary

LOG = "log.txt"


def run_parts(
    parts: Sequence[Part],
    command: Callable[[Part], Sequence[str]],
    folder: Path,
    machine: str,
    began: float,
    say: Callable[[str], None],
) -> list[PartEnded]:
    """Run `command(part)` of all parts; summary.md in `folder` is written anew after each.

    A part has to end when its own share and those of all before it have passed since `began` (of time.monotonic): none
    takes another's, and what one leaves those after it may use.
    """
    ends = [began + seconds for seconds in itertools.accumulate(part.seconds for part in parts)]
    ended = [PartEnded(part.name, part.about, None) for part in parts]
    for number, (part, end) in enumerate(zip(parts, ends)):
        seconds = end - time.monotonic() - ENDING_SECONDS
        say(f"{part.name}: {part.about} (at most {max(seconds, 0):.0f} s)")
        with (folder / LOG).open("a") as log:
            log.write(f"\n======== {part.name}\n")
        ended[number] = PartEnded(part.name, part.about, _run(seconds, command(part), folder))
        say(f"  {_told(ended[number], folder)}")
        write_summary(folder, machine, ended)
    return ended


def _run(seconds: float, command: Sequence[str], folder: Path) -> Ended:
    try:
        return run_within(seconds, command, folder / LOG)
    except OSError as error:  # no more processes, no more disk: the next part may find some
        return Ended(f"{type(error).__name__}: {error}", 0.0)


def _told(part: PartEnded, folder: Path) -> str:
    assert part.ended is not None
    states = [finding.state for finding in read_findings(folder) if finding.part == part.name]
    counts = [("ok", "ok"), ("failed", "failed"), ("planned", "not reached"), ("left out", "left out")]
    told = ", ".join(f"{states.count(state)} {word}" for state, word in counts if state in states)
    return f"{part.ended.how} after {part.ended.seconds:.0f} s{told and ': '}{told}"
