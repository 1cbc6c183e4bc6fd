"""One look for all pages: a page is a title and sections of blocks, written as HTML that needs nothing else.

What a terminal shows as well is written as Markdown from the same blocks; figures are the page's alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape, unescape
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_mixcpt import __version__
from megatron_mixcpt.files import write_whole

COLOURS = 12
_TAG = re.compile(r"<[^>]+>")
_NUMBER = re.compile(r"[+\-–<x×]? ?[\d.,]*(\d|$)|–")


class Html(str):
    """Text that is markup already."""


Cell = str | Html | int | None


def html(value: Any) -> Html:
    """As markup: escaped, unless it is some."""
    return value if isinstance(value, Html) else Html(escape("–" if value is None else str(value)))


def plain(value: Any) -> str:
    """As Markdown: markup without its tags; what looks like a tag in other text is text."""
    if isinstance(value, Html):
        value = unescape(_TAG.sub("", value))
    return "–" if value is None else re.sub(r"<(?=[A-Za-z/!?])", r"\\<", str(value))


def join(*parts: Any) -> Html:
    """One after the other."""
    return Html("".join(html(part) for part in parts))


def key(name: str, colour: int) -> Html:
    """A name with its colour."""
    return Html(f'<span class="key c{colour % COLOURS}">{escape(name)}</span>')


def bar(share: float, colour: int | str, mark: float | None = None) -> Html:
    """A horizontal bar, 0 to 1; `mark`: where a line crosses it."""
    line = f'<u style="left:{100 * mark:.2f}%"></u>' if mark is not None else ""
    kind = colour if isinstance(colour, str) else f"c{colour % COLOURS}"
    return Html(f'<div class="share {kind}"><i style="width:{100 * min(1.0, share):.2f}%"></i>{line}</div>')


def stack(shares: Sequence[tuple[float, int, str]]) -> Html:
    """One bar cut into (share, colour, what it is)."""
    pieces = "".join(f'<i class="c{c}" style="flex:{s:.5f}" title="{escape(text)}"></i>' for s, c, text in shares if s)
    return Html(f'<div class="stack">{pieces}</div>')


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "soft small"

    def html(self) -> str:
        return f'<p class="{self.kind}">{html(self.text)}</p>'

    def markdown(self) -> str:
        return plain(self.text)


@dataclass(frozen=True)
class Table:
    """Columns of numbers stand to the right. A column without a name holds pictures, which Markdown leaves out."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def html(self) -> str:
        texts = [[_TAG.sub("", html(cell)) for cell in column] for column in zip(*self.rows)]
        classes = ["n" if all(_NUMBER.match(text) for text in column) and any(column) else "" for column in texts]
        classes += [""] * (len(self.head) - len(classes))
        head = "".join(
            f'<th class="{kind or ("" if name else "wide")}">{html(name)}</th>'
            for name, kind in zip(self.head, classes)
        )
        body = ""
        for row in self.rows:
            cells = zip(row, self.head, classes)
            body += "".join(
                f'<td class="{kind}" data-label="{escape(name)}">{html(cell)}</td>' for cell, name, kind in cells
            ).join(("<tr>", "</tr>"))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def markdown(self) -> str:
        kept = [index for index, name in enumerate(self.head) if name or index == 0]

        def line(cells: Sequence[Any]) -> str:
            texts = (plain(cells[i]) for i in kept)
            return f"| {' | '.join(' '.join(text.split()).replace('|', chr(92) + '|') for text in texts)} |"

        return "\n".join([line(self.head), "|" + "---|" * len(kept), *map(line, self.rows)])


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str

    def html(self) -> str:
        return f"<pre>{escape(self.text)}</pre>"

    def markdown(self) -> str:
        return f"```\n{self.text}\n```"


@dataclass(frozen=True)
class Figure:
    """An image with what it shows, for the page alone."""

    picture: str
    title: str = ""
    what: str = ""
    legend: str = ""

    def html(self) -> str:
        head = f'<header><h3>{html(self.title)}</h3><span class="what">{html(self.what)}</span></header>'
        return f"{head if self.title else ''}{self.legend}{self.picture}"

    def markdown(self) -> str:
        return ""


Block = Text | Table | Code | Figure


@dataclass
class Page:
    """Sections in their order. `subtitle` stands below the title."""

    title: str
    subtitle: str = ""
    _parts: list[tuple[str, list[list[Block]], bool]] = field(default_factory=list)

    def section(self, title: str, *blocks: Block) -> None:
        """Blocks in one card; nothing where there is none."""
        if blocks:
            self._parts.append((title, [list(blocks)], False))

    def figures(self, title: str, figures: Sequence[Figure]) -> None:
        """Figures beside each other, a card each; nothing where there is none."""
        if figures:
            self._parts.append((title, [[figure] for figure in figures], True))

    def tiles(self, facts: Sequence[tuple[str, Sequence[str | None]]]) -> None:
        """Numbers with their names, each of one or of several runs by colour; what nobody knows is left out."""
        cells = ""
        for name, values in facts:
            if any(value is not None for value in values):
                several = (f'<b class="key c{i % COLOURS}">{html(value)}</b>' for i, value in enumerate(values))
                shown = "".join(several) if len(values) > 1 else f"<b>{html(values[0])}</b>"
                cells += f'<div class="tile">{shown}<span>{html(name)}</span></div>'
        kind = " several" if any(len(values) > 1 for _, values in facts) else ""
        self._parts.append(("", [[Figure(f'<div class="tiles{kind}">{cells}</div>')]], True))

    def folded(self, title: str, *blocks: Block) -> None:
        """Blocks that are shown when asked for."""
        inner = "".join(block.html() for block in blocks)
        self._parts.append(("", [[Figure(f"<details><summary>{html(title)}</summary>{inner}</details>")]], False))

    def html(self, origin: str = "") -> str:
        """The whole file: the same content gives the same bytes, so there is no time of day in it."""
        body = []
        for title, cards, beside in self._parts:
            inner = ["".join(block.html() for block in card) for card in cards]
            if title:
                body.append(f"<h2>{html(title)}</h2>")
            if len(inner) == 1 and inner[0].startswith('<div class="tiles'):
                body.append(inner[0])
            elif beside:
                body.append(f'<div class="charts">{"".join(f"<div class=card>{card}</div>" for card in inner)}</div>')
            else:
                body.append(f'<div class="card">{inner[0]}</div>')
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>{escape(self.title)} &middot; mixcpt</title><style>\n{_asset('page.css')}</style></head>\n"
            "<body><main>"
            f'<header><div><h1>{escape(self.title)}</h1><div class="soft">{html(self.subtitle)}</div></div>'
            '<button id="theme" type="button">Dark</button></header>\n'
            + "\n".join(body)
            + f"\n<footer>Written by megatron-mixcpt {__version__}{escape(origin)}.</footer></main>"
            f'<div id="tip" hidden></div>\n<script>\n{_asset("page.js")}</script></body></html>\n'
        )

    def markdown(self) -> str:
        """Texts and tables."""
        lines = [f"# {self.title}"] + [re.sub(r"<[^>]+>", "", self.subtitle)] * bool(self.subtitle)
        for title, cards, _ in self._parts:
            texts = [text for card in cards for block in card if (text := block.markdown())]
            lines += [f"## {title}"] * bool(title and texts) + texts
        return "\n\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Write the page at `path`, and beside it its Markdown."""
        write_whole(path, self.html())
        write_whole(path.with_suffix(".md"), self.markdown())


def _asset(name: str) -> str:
    return (files("megatron_mixcpt.report") / name).read_text(encoding="utf-8")
