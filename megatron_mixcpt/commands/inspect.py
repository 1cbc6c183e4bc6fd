"""`mixcpt inspect`: look at stored sequences as text, what is a target set apart; preference pairs side by side."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mixcpt.commands.options import count, not_negative
from megatron_mixcpt.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mixcpt.data_prep.mix import Split

NAME = "inspect"
HELP = """Show stored sequences as text, coloured by kind, with what is a target set apart (in brackets where there are
no colours); of preference pairs both answers side by side."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("data", help="folder with mix.json, or the prefix of one .bin/.idx pair beside it")
    parser.add_argument(
        "--sample", type=count, default=5, metavar="N", help="sequences, or pairs, from each prefix (5)"
    )
    parser.add_argument("--sequence", type=int, metavar="I", help="show this sequence, or pair, instead of a sample")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the sample (0)")
    parser.add_argument("--html", metavar="FILE", help="write a page instead")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    from megatron_mixcpt.data_prep.mix import FILE_NAME, read_mix
    from megatron_mixcpt.data_prep.show import LEGEND, legend_block, record_blocks
    from megatron_mixcpt.data_prep.tokenizer import load_tokenizer
    from megatron_mixcpt.files import write_whole
    from megatron_mixcpt.report.page import Page

    path = Path(args.data)
    whole = path.is_dir() or path.suffix == ".json"
    if not whole and not (path.parent / FILE_NAME).is_file():
        raise ConfigError(f"{path}: neither a folder with {FILE_NAME} nor a prefix beside one")
    mix = read_mix(path if whole else path.parent)
    known = {split.prefix.name: (source, name, split) for source, name, split in mix.prefixes}
    wanted = path.name.removesuffix(".bin").removesuffix(".idx").removesuffix(".flags")
    if not whole and wanted not in known:
        raise ConfigError(f"{mix.path} names no prefix {wanted!r}; it has: {', '.join(known)}")
    decode = load_tokenizer(mix.tokenizer.path, eos_token=mix.tokenizer.eos_id).decode
    page, console = Page(f"Records of {path.name}", str(mix.path)), Console(highlight=False)
    if args.html:
        page.section("", legend_block())
    else:
        console.print(_kinds(), LEGEND, sep="", soft_wrap=True)
    for prefix, (source, name, split) in known.items():
        if not whole and prefix != wanted:
            continue
        title = f"{source.name} {name}: {split.sequences} sequences, {split.tokens} tokens"
        paired = name.startswith("pairs/")
        chosen = _choose(split, args, paired=paired)
        if args.html:
            blocks = [block for index in chosen for block in record_blocks(split, index, decode, paired=paired)]
            page.section(title, *blocks)
            continue
        console.rule(title)
        for index in chosen:
            _print_record(console, split, index, decode, paired=paired)
    if args.html:
        write_whole(Path(args.html), page.html())
        print(f"page: {args.html}")
    return 0


def _kinds() -> Any:
    from rich.text import Text

    from megatron_mixcpt.data_prep.format import KIND_NAMES
    from megatron_mixcpt.data_prep.show import COLOURS

    legend = Text("kinds: ")
    for kind, colour in zip(KIND_NAMES, COLOURS):
        legend.append(f"{kind} ", style=f"bold {colour}")
    return legend.append("| ")


def _choose(split: "Split", args: argparse.Namespace, *, paired: bool) -> list[int]:
    """Numbers of sequences, or of pairs."""
    count = split.sequences // 2 if paired else split.sequences
    if args.sequence is None:
        rng = np.random.default_rng(args.seed)
        return sorted(rng.choice(count, size=min(args.sample, count), replace=False).tolist())
    if not 0 <= args.sequence < count:
        what = "pairs" if paired else "sequences"
        raise ConfigError(f"--sequence: {split.prefix.name} has {what} 0 to {count - 1}")
    return [args.sequence]


def _print_record(console: Any, split: "Split", index: int, decode: Any, *, paired: bool) -> None:
    from rich.table import Table

    from megatron_mixcpt.data_prep.format import open_indexed
    from megatron_mixcpt.data_prep.show import describe, rich_text, runs_of

    tokens, flags = open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")
    colours = console.is_terminal and not console.no_color

    def text(row: int) -> Any:
        return rich_text(*runs_of(tokens[row], flags[row], decode), colours=colours)

    if not paired:
        console.print(f"[bold]{describe(flags[index], f'sequence {index}')}[/bold]")
        console.print(text(index), soft_wrap=True)
        return
    sides = Table(title=f"pair {index}", title_justify="left", expand=True, show_lines=False)
    rows = (2 * index, 2 * index + 1)
    for row, name in zip(rows, ("chosen", "rejected")):
        sides.add_column(describe(flags[row], name), ratio=1, overflow="fold")
    sides.add_row(*map(text, rows))
    console.print(sides)
