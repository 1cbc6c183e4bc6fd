"""The tables and bars of the report page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from megatron_mixcpt.observe.line_chart import number
from megatron_mixcpt.observe.run_data import Run, differing_settings
from megatron_mixcpt.units import duration

# Parts of the time in the order of a step, with the index of their colour.
PARTS = {
    "data": 5,
    "teacher": 1,
    "forward": 0,
    "loss": 4,
    "backward": 3,
    "communication": 6,
    "optimizer": 2,
    "validation": 9,
    "checkpoint": 8,
    "other": 7,
}
SMALLEST_LABEL = 0.07  # share of the bar that has room for a word
CHECKPOINTS_SHOWN = 12


def learned_table(runs: Sequence[Run]) -> str:
    """Validation perplexity of each source before and after; empty without validation."""
    rows = []
    changes = []
    for index, run in enumerate(runs):
        for source in run.sources("val/", "/ppl"):
            points = [point for point in run.series[f"val/{source}/ppl"] if point.value is not None]
            if points:
                delta = run.last(f"forget/{source}/delta")
                before = points[0].value if points[0].step == 0 else None
                rows.append((index, run, source, before, points[-1].value, delta))
                changes += [abs(delta)] if delta is not None else []
    if not rows:
        return ""
    widest = max(changes, default=0.0) or 1.0
    body = []
    for index, run, source, before, after, delta in sorted(rows, key=lambda row: (row[2], row[0])):
        name = f"<td>{escape(source)}</td>"
        if len(runs) > 1:
            name += f'<td><span class="key c{index % 8}">{escape(run.name)}</span></td>'
        if delta is None:
            change = "<td class='n soft'>–</td><td></td>"
        else:
            kind = "good" if delta < 0 else "bad"
            percent = f"{math.expm1(delta):+.1%}" if delta < 1.5 else f"x {math.exp(delta):.1f}"
            width = 50.0 * abs(delta) / widest
            left = 50.0 - width if delta < 0 else 50.0
            change = (
                f'<td class="n {kind}">{percent}</td><td><div class="delta"><i class="{kind}" '
                f'style="left:{left:.2f}%;width:{width:.2f}%"></i></div></td>'
            )
        body.append(f"<tr>{name}<td class='n'>{_ppl(before)}</td><td class='n'>{_ppl(after)}</td>{change}</tr>")
    run_column = "<th>run</th>" if len(runs) > 1 else ""
    return (
        '<div class="card scroll"><p class="soft small">Perplexity on held-out text of each source, before training '
        "and at the newest validation. To the left: learned; to the right: forgotten.</p><table><tr><th>source</th>"
        f"{run_column}<th class='n'>before</th><th class='n'>now</th><th class='n'>change</th>"
        "<th class='wide'></th></tr>"
        f"{''.join(body)}</table></div>"
    )


def pairs_table(runs: Sequence[Run]) -> str:
    """Of DPO: accuracy, margin and loss on each source's held-out preference pairs; empty without."""
    body = []
    of_all = [(source, index, run) for index, run in enumerate(runs) for source in run.sources("val/", "/accuracy")]
    for source, index, run in sorted(of_all, key=lambda one: one[:2]):
        name = f"<td>{escape(source)}</td>"
        if len(runs) > 1:
            name += f'<td><span class="key c{index % 8}">{escape(run.name)}</span></td>'
        cells = []
        for metric, shown in (("accuracy", _percent), ("margin", _fixed), ("loss", _fixed)):
            points = run.series.get(f"val/{source}/{metric}", [])
            before = points[0].value if points and points[0].step == 0 else None
            newest = run.last(f"val/{source}/{metric}")
            cells += [f"<td class='n'>{shown(value)}</td>" for value in (before, newest)]
        body.append(f"<tr>{name}{''.join(cells)}</tr>")
    if not body:
        return ""
    run_column = "<th>run</th>" if len(runs) > 1 else ""
    heads = "".join(
        f"<th class='n'>{name} before</th><th class='n'>now</th>" for name in ("accuracy", "margin", "loss")
    )
    return (
        '<div class="card scroll"><p class="soft small">Preference pairs held out of each source, before training and '
        "at the newest validation. Accuracy: share of pairs whose chosen answer has the higher reward, a tie counting "
        f"half.</p><table><tr><th>source</th>{run_column}{heads}</tr>{''.join(body)}</table></div>"
    )


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _ppl(value: float | None) -> str:
    if value is None:
        return "–"
    return number(value) if value >= 1e4 else f"{value:.2f}"


def mixture_table(runs: Sequence[Run]) -> str:
    """Shares that were asked for and reached."""
    body = []
    sources = dict.fromkeys(name for run in runs for name in [*run.shares, *run.sources("mix/share/", "")])
    for place, source in enumerate(sources):
        for index, run in enumerate(runs):
            if source not in run.shares and f"mix/share/{source}" not in run.series:
                continue
            share = run.shares.get(source)
            reached = run.last(f"mix/share/{source}")
            colour = place % 8 if len(runs) == 1 else index % 8
            drawn = share.samples if share else None
            bar = ""
            if drawn is not None and share is not None:
                bar = (
                    f'<div class="share c{colour}"><i style="width:{100 * drawn:.2f}%"></i>'
                    f'<u style="left:{100 * share.requested:.2f}%" title="asked for"></u></div>'
                )
            name = f'<td><span class="key c{index % 8}">{escape(run.name)}</span></td>' if len(runs) > 1 else ""
            body.append(
                f"<tr><td>{escape(source)}</td>{name}<td class='n'>{_percent(share.requested if share else None)}</td>"
                f"<td class='n'>{_percent(drawn)}</td><td>{bar}</td><td class='n'>{_percent(reached)}</td>"
                f"<td class='n'>{number(run.last(f'mix/tokens/{source}') or 0)}</td></tr>"
            )
    if not body:
        return ""
    run_column = "<th>run</th>" if len(runs) > 1 else ""
    return (
        '<div class="card scroll"><p class="soft small">Bar: share of the samples drawn up to the newest checkpoint; '
        "mark: share of the samples asked for. The share of target tokens differs from that of samples where prompts "
        f"are masked or sequences not full.</p><table><tr><th>source</th>{run_column}"
        "<th class='n'>samples asked for</th><th class='n'>samples drawn</th><th class='wide'></th>"
        f"<th class='n'>of target tokens</th><th class='n'>target tokens</th></tr>{''.join(body)}</table></div>"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def time_section(runs: Sequence[Run]) -> str:
    """A bar for each run, cut into the parts of its time; empty where no row has them."""
    blocks = []
    used: list[str] = []
    for index, run in enumerate(runs):
        totals = {part: sum(run.values(f"time/{part}")) for part in PARTS}
        # Parts that other objectives bring.
        totals |= {name: sum(run.values(f"time/{name}")) for name in run.sources("time/", "") if name not in PARTS}
        whole = sum(totals.values())
        if whole <= 0:
            continue
        pieces = []
        for part, seconds in totals.items():
            if seconds / whole < 5e-4:
                continue
            used.append(part)
            colour = PARTS.get(part, 7)
            text = f"{part}: {duration(seconds) if seconds >= 1 else f'{seconds:.2g} s'}, {seconds / whole:.1%}"
            pieces.append(f'<i class="c{colour}" style="flex:{seconds / whole:.5f}" title="{escape(text)}"></i>')
        head = f'<span class="key c{index % 8}">{escape(run.name)}</span> ' if len(runs) > 1 else ""
        steps = run.values("speed/step_seconds")
        mean = f", {sum(steps) / len(steps):.3g} s a step" if steps else ""
        blocks.append(f'<div class="small soft">{head}{duration(whole)} in all{mean}</div>')
        blocks.append(f'<div class="stack">{"".join(pieces)}</div>')
        blocks.append(_parts_legend(totals, whole))
    return f'<div class="card">{"".join(blocks)}</div>' if blocks else ""


def _parts_legend(totals: dict[str, float], whole: float) -> str:
    keys = [
        f'<span class="key c{PARTS.get(part, 7)}">{escape(part)} {seconds / whole:.1%}</span>'
        for part, seconds in totals.items()
        if seconds / whole >= 5e-4
    ]
    return f'<div class="legend" style="margin-bottom:14px">{"".join(keys)}</div>'


def differences(runs: Sequence[Run]) -> str:
    """Settings that are not the same in all runs."""
    rows = differing_settings(list(runs))
    if not rows:
        return '<div class="card soft">None: the runs have the same settings.</div>'
    head = "".join(f'<th><span class="key c{i % 8}">{escape(run.name)}</span></th>' for i, run in enumerate(runs))
    body = "".join(
        f'<tr><td class="key-name">{escape(key)}</td>'
        + "".join(f'<td class="value">{_shown(v)}</td>' for v in values)
        + "</tr>"
        for key, values in rows.items()
    )
    return f'<div class="card scroll"><table><tr><th>key</th>{head}</tr>{body}</table></div>'


def settings_table(run: Run) -> str:
    """All settings, folded away."""
    if not run.settings:
        return ""
    body = "".join(
        f'<tr><td class="key-name">{escape(key)}</td><td class="value">{_shown(value)}</td></tr>'
        for key, value in run.settings.items()
    )
    return (
        '<div class="card scroll" style="margin-bottom:10px"><details>'
        f"<summary>All settings of {escape(run.name)}</summary><table>{body}</table></details></div>"
    )


def _shown(value: Any) -> str:
    """As the user would write it."""
    return escape(value if isinstance(value, str) else json.dumps(value))


def checkpoint_table(runs: Sequence[Run]) -> str:
    """What can be resumed from and exported."""
    body = []
    for index, run in enumerate(runs):
        seconds = {point.step: point.value for point in run.series.get("ckpt/seconds", [])}
        name = f'<td><span class="key c{index % 8}">{escape(run.name)}</span></td>' if len(runs) > 1 else ""
        for saved in run.checkpoints[:CHECKPOINTS_SHOWN]:
            took = seconds.get(saved.step)
            when = datetime.fromtimestamp(saved.path.stat().st_mtime)
            body.append(
                f"<tr>{name}<td class='n'>{saved.step}</td><td>{when:%Y-%m-%d %H:%M}</td>"
                f"<td class='n'>{_bytes(saved.num_bytes)}</td>"
                f"<td class='n'>{'–' if took is None else f'{took:.1f} s'}</td>"
                f"<td class='key-name'>{escape(str(saved.path))}</td></tr>"
            )
        if len(run.checkpoints) > CHECKPOINTS_SHOWN:
            older = len(run.checkpoints) - CHECKPOINTS_SHOWN
            body.append(f"<tr>{name}<td colspan='5' class='soft'>and {older} older ones</td></tr>")
    if not body:
        return ""
    run_column = "<th>run</th>" if len(runs) > 1 else ""
    return (
        f'<div class="card scroll"><table><tr>{run_column}<th class="n">step</th><th>saved</th><th class="n">size</th>'
        f'<th class="n">took</th><th>folder</th></tr>{"".join(body)}</table></div>'
    )


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} TiB"
