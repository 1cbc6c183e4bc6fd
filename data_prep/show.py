"""Stored sequences as text one can read: kinds by colour, what is a target set apart with and without colour."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.format import DOC_START, KIND_NAMES, PAD, TARGET, kind_of, open_indexed
from megatron_mixcpt.data_prep.mix import Split
from megatron_mixcpt.report.page import Block, Figure, Html, Text

COLOURS = dict(zip(KIND_NAMES, ("cyan", "green", "yellow", "red", "magenta"), strict=True))
OPEN, CLOSE = "⟦", "⟧"  # around targets, where there are no colours
LEGEND = f"⏎ line break, ▮ document start, {OPEN}target{CLOSE}: what the loss counts; the rest is read only"
TOKENS_SHOWN = 240  # of a record on a page

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Run:
    """Tokens with equal flags."""

    tokens: list[str]
    kind: int
    target: bool
    starts: bool
    """A document begins with it. A document's first token is never a target, and stands in the run it begins."""

    @property
    def text(self) -> str:
        return "".join(self.tokens).replace("\n", "⏎\n")


def runs_of(tokens: np.ndarray, flags: np.ndarray, decode: Decode) -> tuple[list[Run], int]:
    """The runs of a sequence, and how many tokens of padding follow."""
    filled = int(np.count_nonzero(flags & PAD == 0))
    ids, marks = tokens[:filled], flags[:filled]
    starts = (marks & DOC_START) != 0
    change = np.flatnonzero(np.diff(marks & ~np.uint8(DOC_START), prepend=-1).astype(bool) | starts).tolist()
    runs = []
    for begin, end in zip(change, [*change[1:], filled]):
        texts = _pieces(ids[begin:end].tolist(), decode)
        runs.append(Run(texts, int(kind_of(marks[begin])), bool(marks[begin] & TARGET), bool(starts[begin])))
    return runs, len(flags) - filled


def _pieces(ids: list[int], decode: Decode) -> list[str]:
    """The text of each token, which together are the text of all; a character of several tokens is the last one's."""
    pieces, done, first = [], "", 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[first:end])
        whole = not text.endswith("\ufffd")
        pieces.append(text[len(done) :] if whole else "")
        done = text if whole else done
        if whole and end - first >= 64:  # decoding is linear: begin anew now and then
            following = decode(ids[first : end + 8])
            alone = decode(ids[end : end + 8])
            if following == text + alone:
                first, done = end, ""
    return pieces if "".join(pieces) == decode(ids) else [decode(ids)]


def rich_text(runs: list[Run], padding: int, *, colours: bool) -> Any:
    """For a terminal; without colours, targets stand in brackets."""
    from rich.text import Text as RichText

    text = RichText()
    for number, run in enumerate(runs):
        if run.starts:
            text.append("\n" * bool(number) + "▮", style="bold")
        colour = COLOURS[KIND_NAMES[run.kind]]
        style = colour if run.target else f"{colour} dim underline"
        text.append(run.text if colours or not run.target else f"{OPEN}{run.text}{CLOSE}", style=style)
    if padding:
        text.append(f"\n[{padding} padding]", style="dim")
    return text


def markup(runs: list[Run], padding: int, limit: int | None = None) -> Html:
    """For a page: a box for each token, of targets filled and underlined. `limit`: so many tokens at most."""
    parts, left = [], sum(len(run.tokens) for run in runs) if limit is None else limit
    total = sum(len(run.tokens) for run in runs)
    for number, run in enumerate(runs):
        if run.starts:
            parts.append("<br>" * bool(number) + "<em>▮</em>")
        name = "b" if run.target else "s"
        for token in run.tokens[: max(0, left)]:
            parts.append(f"<{name} class='k{run.kind}'>{escape(token).replace(chr(10), '⏎' + chr(10))}</{name}>")
        left -= len(run.tokens)
        if left <= 0 and limit is not None and total > limit:
            parts.append(f"<em> … {total - limit} more</em>")
            break
    if padding:
        parts.append(f"<br><em>{padding} tokens of padding</em>")
    return Html(f'<div class="tokens">{"".join(parts)}</div>')


def record_blocks(split: Split, index: int, decode: Decode, *, paired: bool, limit: int | None = None) -> list[Block]:
    """A sequence for a page, or, of preference pairs, the pair `index` with both answers side by side."""
    tokens, flags = open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")
    rows = [2 * index, 2 * index + 1] if paired else [index]
    shown = [markup(*runs_of(tokens[row], flags[row], decode), limit) for row in rows]
    if not paired:
        return [Text(describe(flags[index], f"sequence {index}")), Figure(shown[0])]
    sides = "".join(
        f"<div><p class='soft small'>{describe(flags[row], name)}</p>{text}</div>"
        for row, name, text in zip(rows, ("chosen", "rejected"), shown)
    )
    return [Text(f"pair {index}"), Figure(Html(f'<div class="pair">{sides}</div>'))]


def describe(flags: np.ndarray, name: str) -> str:
    """How much of a sequence is text, and how much of that counts."""
    filled, targets = int((flags & PAD == 0).sum()), int((flags & TARGET != 0).sum())
    return f"{name}: {filled} of {len(flags)} tokens, {targets} targets"


def legend_block() -> Figure:
    """What the boxes of a page mean."""
    kinds = "".join(f"<b class='k{kind}'>{name}</b>  " for kind, name in enumerate(KIND_NAMES))
    note = (
        "filled and underlined: a target, which the loss counts; <s>grey: read only</s>; ▮ document start, ⏎ line break"
    )
    return Figure(Html(f'<div class="tokens">{kinds}<br>{note}</div>'))
