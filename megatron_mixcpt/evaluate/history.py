"""What went when: a run's kept checkpoints beside the model that it started from, in history.json and a page of curves.

What was measured is kept: the same command goes on, and measures checkpoints that have come since.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate import measure
from megatron_mixcpt.evaluate.ledger import Entry, ledger
from megatron_mixcpt.evaluate.ledger_report import answered, shortened
from megatron_mixcpt.evaluate.loading import quiet_libraries
from megatron_mixcpt.evaluate.measure import EvalSettings, Measured
from megatron_mixcpt.evaluate.stored import from_rows, rows_of
from megatron_mixcpt.files import check_writable, write_json
from megatron_mixcpt.report.figures import Series, legend, line_chart
from megatron_mixcpt.report.page import COLOURS, Cell, Figure, Page, Table, Text

SHOWN = 40  # questions on the page
CAPTION = (
    "The shares are those of all questions, without the changes that guessing among given answers explains. Step 0 is "
    "the model that the run started from."
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One model of the history; `step` 0 is the base."""

    step: int
    path: str
    measured: Measured
    content: str | None = None
    """Of its weights, to tell when the step was trained anew."""


def measure_history(run: Path, base: Path, settings: EvalSettings, out: Path, *, overwrite: bool = False) -> None:
    """Measure `base` and the checkpoints that `run` keeps, oldest first; write history.json, .html and .md into `out`.

    Raises ConfigError where the run has no checkpoint, or `out` holds a history that was measured otherwise.
    """
    from megatron_mixcpt.checkpoint.manifest import fingerprint
    from megatron_mixcpt.checkpoint.store import list_checkpoints, step_of
    from megatron_mixcpt.evaluate.target import is_hf_directory
    from megatron_mixcpt.huggingface.weights import weights_fingerprint

    checkpoints = sorted(list_checkpoints(run / "checkpoints"), key=step_of)
    if not checkpoints:
        raise ConfigError(f"{run} is no run with checkpoints: --history measures those that a run has kept")
    measure.check_models([base, checkpoints[0]], settings)
    check_writable(out)
    quiet_libraries()
    texts = {"mixture": settings.mix_path, "questions": settings.gci and Path(settings.gci)}
    hashes = {name: xxh3_128_hexdigest(path.read_bytes()) for name, path in texts.items() if path and path.is_file()}
    how = json.loads(json.dumps({"run": run, "base": base} | dataclasses.asdict(settings) | hashes, default=str))
    points = [] if overwrite else _read(out / "history.json", how)
    for step, path in [(0, base), *((step_of(path), path) for path in checkpoints)]:
        content = weights_fingerprint(path) if is_hf_directory(path) else fingerprint(path)
        if any((point.step, point.content) == (step, content) for point in points):
            continue
        points = [point for point in points if point.step != step]
        points.append(Point(step, str(path), measure.measure_model(path, settings), content))
        points.sort(key=lambda point: point.step)
        _write(out, how, points)
    _write(out, how, points)


def _read(path: Path, how: dict[str, Any]) -> list[Point]:
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        points = [Point(row["step"], row["path"], from_rows(row), row.get("content")) for row in content["points"]]
        measured = content["measured"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: no history to go on with: give another --out, or --overwrite") from None
    if measured != how:
        changed = [name for name in how if measured.get(name) != how[name]]
        raise ConfigError(f"{path} was measured with another {', '.join(changed)}: give another --out, or --overwrite")
    return points


def _write(out: Path, how: dict[str, Any], points: Sequence[Point]) -> None:
    run = how["run"]
    rows = [
        {"step": point.step, "path": point.path, "content": point.content} | rows_of(point.measured) for point in points
    ]
    base = answered(points[0].measured)
    books = {point.step: ledger(base, answered(point.measured)) for point in points[1:]} if base else {}
    ledgers = {step: [dataclasses.asdict(entry) for entry in entries] for step, entries in books.items()}
    write_json(out / "history.json", {"run": run, "measured": how, "points": rows, "ledger": ledgers})
    page = Page(Path(run).name, f"What went when: {len(points) - 1} checkpoints of {run} beside {how['base']}.")
    figures = [_losses(points)] if points[0].measured["sources"] and len(points) > 1 else []
    page.figures("Curves", [*figures, *(_curve(books, kind) for kind in ("lost", "learned") if books)])
    if books:
        page.section("Answers lost and learned", Text(CAPTION), _table(books))
        page.section("What was lost, and since when", *_fates(points))
    page.write(out / "history.html")


def _losses(points: Sequence[Point]) -> Figure:
    before = {source.name: math.log(source.value) for source in points[0].measured["sources"]}
    series = [
        Series(
            name,
            [
                (point.step, math.log(source.value) - before[name])
                for point in points
                for source in point.measured["sources"]
                if source.name == name
            ],
            colour,
        )
        for colour, name in enumerate(before)
    ]
    chart = line_chart("rise of the loss of each source", series, "step", zero=True)
    return Figure(chart, "Rise of the loss", "nats a token; above 0 forgotten", _legend(series))


def _curve(books: dict[int, list[Entry]], kind: str) -> Figure:
    tasks = list(dict.fromkeys(entry.task for entries in books.values() for entry in entries))[:COLOURS]
    series = [
        Series(
            task,
            [(0.0, 0.0)]
            + [
                (float(step), 100 * getattr(entry, kind).value)
                for step, entries in books.items()
                for entry in entries
                if entry.task == task and entry.group is None
            ],
            colour,
        )
        for colour, task in enumerate(tasks)
    ]
    chart = line_chart(f"answers {kind}", series, "step", zero=True)
    return Figure(chart, f"Answers {kind}", "% of the questions", _legend(series))


def _legend(series: Sequence[Series]) -> str:
    return legend((one.name, one.colour) for one in series)


def _table(books: dict[int, list[Entry]]) -> Table:
    rows: list[list[Cell]] = [
        [
            entry.task,
            str(step),
            str(entry.count),
            str(entry.num_lost),
            str(entry.num_learned),
            f"{100 * entry.change.value:+.0f} % [{100 * entry.change.low:+.0f}, {100 * entry.change.high:+.0f}]",
        ]
        for step, entries in books.items()
        for entry in entries
        if entry.group is None
    ]
    return Table(["questions", "step", "number", "lost", "learned", "change, 95 % interval"], rows)


def _fates(points: Sequence[Point]) -> list[Text | Table]:
    """Questions that the base had right and some checkpoint has wrong, by the step since which they are lost."""
    later = [(point.step, {(i.task, i.id): i for i in answered(point.measured)}) for point in points[1:]]
    lost, back = [], 0
    for item in answered(points[0].measured):
        right = [items[item.task, item.id].right for _, items in later]
        if not item.right or all(right):
            continue
        if right[-1]:
            back += 1
            continue
        since = next(later[at][0] for at in range(len(later)) if not any(right[at:]))
        lost.append((since, item, later[-1][1][item.task, item.id].answer))
    lost.sort(key=lambda entry: (entry[0], math.inf if entry[1].sure is None else -entry[1].sure))
    text = f"{len(lost)} answers are wrong at the last checkpoint; {back} were wrong at an earlier one and came back."
    if not lost:
        return [Text(text)]
    rows: list[list[Cell]] = [
        [
            shortened(item.question),
            item.task,
            str(since),
            None if item.sure is None else f"{item.sure:.2f}",
            *(shortened(words) for words in (item.expected, item.answer, now)),
        ]
        for since, item, now in lost[:SHOWN]
    ]
    head = ["question", "of", "lost since step", "base was sure", "expected", "base said", "last says"]
    more = [Text(f"{len(lost) - SHOWN} more are in history.json.")] * (len(lost) > SHOWN)
    return [Text(text), Table(head, rows), *more]
