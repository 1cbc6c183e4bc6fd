"""`mixcpt inspect`: look at stored sequences as text, coloured by kind, with what is a target set apart."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mixcpt.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mixcpt.data_prep.mix import Source, Split

NAME = "inspect"
HELP = "show stored sequences as text, coloured by kind and loss mask"
COLOURS = ("cyan", "green", "yellow", "red", "magenta")  # by kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("data", help="folder with mix.json, or the prefix of one .bin/.idx pair beside it")
    parser.add_argument("--sample", type=int, default=5, metavar="N", help="sequences from each prefix (5)")
    parser.add_argument("--sequence", type=int, metavar="I", help="show this sequence instead of a sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    from megatron_mixcpt.data_prep.mix import FILE_NAME, read_mix
    from megatron_mixcpt.data_prep.tokenizer import load_tokenizer

    path = Path(args.data)
    whole = path.is_dir() or path.suffix == ".json"
    if not whole and not (path.parent / FILE_NAME).is_file():
        raise ConfigError(f"{path}: neither a folder with {FILE_NAME} nor a prefix beside one")
    mix = read_mix(path if whole else path.parent)
    known = {split.prefix.name: (source, name, split) for source, name, split in mix.prefixes}
    name = path.name.removesuffix(".bin").removesuffix(".idx").removesuffix(".flags")
    if not whole and name not in known:
        raise ConfigError(f"{mix.path} names no prefix {name!r}; it has: {', '.join(known)}")
    tokenizer = load_tokenizer(mix.tokenizer.path, eos_token=_eos_name(mix.folder))
    console = Console(highlight=False)
    console.print(_legend())
    if not console.is_terminal:
        console.print("colours and underlining are off, because this is no terminal: FORCE_COLOR=1 brings them back")
    for prefix, (source, split_name, split) in known.items():
        if whole or prefix == name:
            _show_prefix(console, source, split_name, split, tokenizer.decode, args)
    return 0


def _eos_name(out: Path) -> str | None:
    """The eos_token of the configuration, which a bare tokenizer.json needs."""
    import orjson

    manifest = out / "manifest.json"
    return orjson.loads(manifest.read_bytes()).get("config", {}).get("eos_token") if manifest.is_file() else None


def _legend() -> Any:
    from rich.text import Text

    from megatron_mixcpt.data_prep.format import KIND_NAMES

    legend = Text("kinds: ")
    for kind, colour in zip(KIND_NAMES, COLOURS):
        legend.append(f"{kind} ", style=f"bold {colour}")
    return legend.append("| ").append("not a target", style="dim underline").append(" | ⏎ line break, ▮ document start")


def _show_prefix(
    console: Any, source: "Source", split_name: str, split: "Split", decode: Any, args: argparse.Namespace
) -> None:
    from megatron_mixcpt.data_prep.format import PAD, TARGET, open_indexed

    tokens, flags = open_indexed(split.prefix), open_indexed(f"{split.prefix}.flags")
    if args.sequence is not None:
        if not 0 <= args.sequence < len(tokens):
            raise ConfigError(f"--sequence: {split.prefix.name} has sequences 0 to {len(tokens) - 1}")
        chosen = [args.sequence]
    else:
        rng = np.random.default_rng(args.seed)
        chosen = sorted(rng.choice(len(tokens), size=min(args.sample, len(tokens)), replace=False).tolist())
    console.rule(f"{source.name} {split_name}: {split.sequences} sequences, {split.tokens} tokens")
    for index in chosen:
        marks = flags[index]
        filled, targets = int((marks & PAD == 0).sum()), int((marks & TARGET != 0).sum())
        console.print(f"[bold]sequence {index}[/bold]: {filled} of {len(marks)} tokens, {targets} targets")
        console.print(render_sequence(tokens[index], marks, decode), soft_wrap=True)


def render_sequence(tokens: np.ndarray, flags: np.ndarray, decode: Any) -> Any:
    """One sequence as rich Text: runs of equal flags are decoded together; padding is only counted."""
    from rich.text import Text

    from megatron_mixcpt.data_prep.format import DOC_START, PAD, TARGET, kind_of

    text = Text()
    starts = (flags & DOC_START) != 0
    change = np.flatnonzero(np.diff(flags & ~np.uint8(DOC_START), prepend=-1).astype(bool) | starts)
    # The first token of a document is never a target; it is shown with the run it begins.
    runs = list(zip(change.tolist(), [*change[1:].tolist(), len(flags)]))
    for begin, end in runs:
        if flags[begin] & PAD:
            text.append(f"\n[{end - begin} padding]", style="dim")
            break
        if starts[begin]:
            text.append("\n" * bool(begin) + "▮", style="bold")
        colour = COLOURS[int(kind_of(flags[begin]))]
        style = colour if flags[begin] & TARGET else f"{colour} dim underline"
        text.append(decode(tokens[begin:end].tolist()).replace("\n", "⏎\n"), style=style)
    return text
