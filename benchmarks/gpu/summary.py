"""summary.md: what ran, what failed, what ran out of time, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Finding, read_findings
from benchmarks.gpu.processes import Ended
from megatron_mixcpt.files import write_whole

FILE_NAME = "summary.md"
SHOWN = 40  # failures of a part


@dataclass(frozen=True)
class PartEnded:
    name: str
    about: str
    ended: Ended | None
    """None: not begun."""


def write_summary(folder: Path, machine: str, parts: Sequence[PartEnded]) -> str:
    """Write it into `folder`, and return it."""
    findings = read_findings(folder)
    text = "\n\n".join(
        [
            "# What one GPU says",
            machine,
            _overview(parts, findings),
            *(_of_part(part, [f for f in findings if f.part == part.name]) for part in parts if part.ended),
        ]
    )
    write_whole(folder / FILE_NAME, text + "\n")
    return text


def went_well(folder: Path, parts: Iterable[PartEnded]) -> bool:
    """Whether every part came to its end, and everything that was tried is right."""
    states = {finding.state for finding in read_findings(folder)}
    return all(part.ended is not None and part.ended.well for part in parts) and not states & {"failed", "planned"}


def _overview(parts: Sequence[PartEnded], findings: Sequence[Finding]) -> str:
    rows = []
    for part in parts:
        states = [finding.state for finding in findings if finding.part == part.name]
        counts = [str(states.count(state)) for state in ("ok", "failed", "planned", "left out")]
        ended = [part.ended.how, f"{part.ended.seconds:.0f}"] if part.ended else ["not begun", ""]
        rows.append([part.name, part.about, *ended, *counts])
    return table(["part", "what", "ended", "seconds", "ok", "failed", "not reached", "left out"], rows)


def _of_part(part: PartEnded, findings: Sequence[Finding]) -> str:
    lines = [f"## {part.name}: {part.about}"]
    failed = [finding for finding in findings if finding.state == "failed"]
    lines += [f"- **failed**: {finding.name}: {finding.told}" for finding in failed[:SHOWN]]
    lines += [f"- and {len(failed) - SHOWN} more"] * (len(failed) > SHOWN)
    for state, title in (("planned", "not reached"), ("left out", "left out")):
        of = [f"{finding.name}{f' ({finding.told})' if finding.told else ''}" for finding in findings]
        named = [text for text, finding in zip(of, findings) if finding.state == state]
        lines += [f"- {title}: {'; '.join(named)}"] * bool(named)
    measured = [finding for finding in findings if finding.state == "ok" and (finding.values or finding.told)]
    if measured:
        columns = list(dict.fromkeys(column for finding in measured for column in finding.values))
        rows = [[f.name, *(f.values.get(column) for column in columns), f.told] for f in measured]
        lines += ["", table(["", *columns, ""], rows)]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    return "\n".join(_row(cells) for cells in (header, ["---"] * len(header), *rows))


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
