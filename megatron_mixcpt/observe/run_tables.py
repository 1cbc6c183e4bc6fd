"""The tables and bars of a run's page; each function returns blocks, none where there is nothing to say."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_mixcpt.observe.run_data import Run, differing_settings
from megatron_mixcpt.report.page import Block, Cell, Figure, Html, Table, Text, bar, html, join, key, stack
from megatron_mixcpt.units import duration, number, percent, size

# Parts of the time in the order of a step, with the index of their colour.
PARTS = {
    "data": 5, "teacher": 1, "forward": 0, "loss": 4, "backward": 3, "communication": 6, "optimizer": 2,
    "validation": 9, "checkpoint": 8, "other": 7,
}  # fmt: skip
CHECKPOINTS_SHOWN = 12
LONGEST = 6.0  # times the middle one: a longer bar is cut, so that it does not flatten all others


def learned(runs: Sequence[Run]) -> list[Block]:
    """Validation perplexity before and after: what was to be learned, and apart from it what was to be kept."""
    groups: dict[str, list[tuple[int, Run, str, float | None, float | None, float | None]]] = {}
    for index, run in enumerate(runs):
        for source in run.sources("val/", "/ppl"):
            points = [point for point in run.series[f"val/{source}/ppl"] if point.value is not None]
            if points:
                kind = {None: "Sources", "domain": "To be learned: the domain"}.get(run.kinds.get(source), "To be kept")
                before = points[0].value if points[0].step == 0 else None
                delta = run.last(f"forget/{source}/delta")
                groups.setdefault(kind, []).append((index, run, source, before, points[-1].value, delta))
    changes = [abs(row[-1]) for rows in groups.values() for row in rows if row[-1] is not None]
    widest = min(max(changes, default=0.0), LONGEST * statistics.median(changes or [0.0]) or 1.0) or 1.0
    rows: list[list[Cell]] = []
    width = 6 if len(runs) > 1 else 5
    for name in sorted(groups, reverse=True):  # the domain first
        if name != "Sources":
            rows.append([Html(f"<b>{name}</b>"), *[""] * (width - 1)])
        for index, run, source, before, after, delta in sorted(groups[name], key=lambda row: (row[2], row[0])):
            cells = [source, *([key(run.name, index)] if len(runs) > 1 else []), _ppl(before), _ppl(after)]
            rows.append([*cells, _change(delta), _delta_bar(delta, widest)])
    if not rows:
        return []
    head = ["source", *(["run"] if len(runs) > 1 else []), "before", "now", "change", ""]
    what = "Perplexity of held-out text, before training and at the newest validation."
    return [Text(f"{what} Bars to the left: learned; to the right: forgotten."), Table(head, rows)]


def _change(delta: float | None) -> Cell:
    if delta is None:
        return None
    text = f"{math.expm1(delta):+.1%}" if delta < 1.5 else f"× {math.exp(delta):.1f}"
    return Html(f'<span class="{"good" if delta < 0 else "bad"}">{text}</span>')


def _delta_bar(delta: float | None, widest: float) -> Cell:
    if delta is None:
        return ""
    kind = ("good" if delta < 0 else "bad") + (" over" if abs(delta) > widest else "")
    width = 50.0 * min(1.0, abs(delta) / widest)
    left = 50.0 - width if delta < 0 else 50.0
    return Html(f'<div class="delta"><i class="{kind}" style="left:{left:.2f}%;width:{width:.2f}%"></i></div>')


def _ppl(value: float | None) -> Cell:
    if value is None:
        return None
    return number(value) if value >= 1e4 else f"{value:.2f}"


def pairs(runs: Sequence[Run]) -> list[Block]:
    """Of DPO: accuracy, margin and loss on each source's held-out preference pairs."""
    rows: list[list[Cell]] = []
    of_all = [(source, index, run) for index, run in enumerate(runs) for source in run.sources("val/", "/accuracy")]
    for source, index, run in sorted(of_all, key=lambda one: one[:2]):
        cells: list[Cell] = [source, *([key(run.name, index)] if len(runs) > 1 else [])]
        for metric in ("accuracy", "margin", "loss"):
            points = run.series.get(f"val/{source}/{metric}", [])
            before = points[0].value if points and points[0].step == 0 else None
            for value in (before, run.last(f"val/{source}/{metric}")):
                cells.append(percent(value) if metric == "accuracy" else None if value is None else f"{value:.4f}")
        rows.append(cells)
    if not rows:
        return []
    heads = [head for name in ("accuracy", "margin", "loss") for head in (f"{name} before", "now")]
    what = "Preference pairs held out of each source, before training and at the newest validation. Accuracy: share of "
    what += "pairs whose chosen answer has the higher reward, a tie counting half."
    return [Text(what), Table(["source", *(["run"] if len(runs) > 1 else []), *heads], rows)]


def mixture(runs: Sequence[Run]) -> list[Block]:
    """Shares that were asked for and reached."""
    rows: list[list[Cell]] = []
    sources = dict.fromkeys(name for run in runs for name in [*run.shares, *run.sources("mix/share/", "")])
    for place, source in enumerate(sources):
        for index, run in enumerate(runs):
            if source not in run.shares and f"mix/share/{source}" not in run.series:
                continue
            share = run.shares.get(source)
            colour = place if len(runs) == 1 else index
            rows.append(
                [
                    source,
                    *([key(run.name, index)] if len(runs) > 1 else []),
                    percent(share.requested if share else None),
                    percent(share.samples if share else None),
                    bar(share.samples, colour, share.requested) if share else "",
                    percent(run.last(f"mix/share/{source}")),
                    number(run.last(f"mix/tokens/{source}") or 0),
                ]
            )
    if not rows:
        return []
    what = "Bar: share of the samples drawn up to the newest checkpoint; mark: share of the samples asked for. The "
    what += "share of target tokens differs from that of samples where prompts are masked or sequences not full."
    head = ["source", *(["run"] if len(runs) > 1 else []), "samples asked for", "samples drawn", ""]
    return [Text(what), Table([*head, "of target tokens", "target tokens"], rows)]


def times(runs: Sequence[Run]) -> list[Block]:
    """A bar for each run, cut into the parts of its time."""
    blocks: list[Block] = []
    for index, run in enumerate(runs):
        totals = {part: sum(run.values(f"time/{part}")) for part in PARTS}
        # Parts that other objectives bring.
        totals |= {name: sum(run.values(f"time/{name}")) for name in run.sources("time/", "") if name not in PARTS}
        whole = sum(totals.values())
        shown = {part: seconds for part, seconds in totals.items() if whole > 0 and seconds / whole >= 5e-4}
        if not shown:
            continue
        steps = run.values("speed/step_seconds")
        mean = f", {sum(steps) / len(steps):.3g} s a step" if steps else ""
        blocks.append(Text(join(key(run.name, index) if len(runs) > 1 else "", f" {duration(whole)} in all{mean}")))
        told = [(s / whole, PARTS.get(p, 7), f"{p}: {_time(s)}, {s / whole:.1%}") for p, s in shown.items()]
        keys = (f'<span class="key c{c}">{html(text.split(":")[0])} {share:.1%}</span>' for share, c, text in told)
        blocks.append(Figure(stack(told)))
        blocks.append(Figure(Html(f'<div class="legend">{"".join(keys)}</div>')))
    return blocks


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{seconds:.2g} s"


def differences(runs: Sequence[Run]) -> list[Block]:
    """Settings that are not the same in all runs."""
    rows = differing_settings(list(runs))
    if not rows:
        return [Text("None: the runs have the same settings.")]
    body = [[Html(f"<code>{html(name)}</code>"), *map(_shown, values)] for name, values in rows.items()]
    return [Table(["key", *(run.name for run in runs)], body)]


def settings(run: Run) -> Table:
    """All of them."""
    return Table(["key", "value"], [[Html(f"<code>{html(k)}</code>"), _shown(v)] for k, v in run.settings.items()])


def _shown(value: Any) -> str:
    """As the user would write it."""
    return value if isinstance(value, str) else json.dumps(value)


def checkpoints(runs: Sequence[Run]) -> list[Block]:
    """What can be resumed from and exported."""
    rows: list[list[Cell]] = []
    for index, run in enumerate(runs):
        seconds = {point.step: point.value for point in run.series.get("ckpt/seconds", [])}
        name = [key(run.name, index)] if len(runs) > 1 else []
        for saved in run.checkpoints[:CHECKPOINTS_SHOWN]:
            took = seconds.get(saved.step)
            when = f"{saved.written:%Y-%m-%d %H:%M}"
            spent = None if took is None else f"{took:.1f} s"
            folder = Html(f"<code>{html(saved.path)}</code>")
            rows.append([f"step {saved.step}", *name, when, size(saved.num_bytes), spent, folder])
        if (older := len(run.checkpoints) - CHECKPOINTS_SHOWN) > 0:
            rows.append([f"{older} older", *name, "", "", "", ""])
    run_column = ["run"] if len(runs) > 1 else []
    return [Table(["checkpoint", *run_column, "saved", "size", "took", "folder"], rows)] if rows else []
