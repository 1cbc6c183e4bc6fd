"""`report.html` and `report.md`: what is in the data, what was thrown away and why, how it is mixed, how it reads."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.assemble import Corpus
from megatron_mixcpt.data_prep.explain import seen
from megatron_mixcpt.data_prep.mix import Mix, Source, Split
from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.data_prep.show import TOKENS_SHOWN, Decode, legend_block, record_blocks
from megatron_mixcpt.report.figures import bar_chart
from megatron_mixcpt.report.page import Block, Cell, Figure, Html, Page, Table, Text, bar, join, key, stack
from megatron_mixcpt.units import number, percent, size

TOP_REASONS = 8
EXAMPLES = 3  # of records thrown away for one reason
RECORDS = 10  # shown as tokens


def write_report(
    out: Path, mix: Mix, counts: list[dict[str, Any]], plans: list[Plan], corpora: list[Corpus], decode: Decode
) -> list[str]:
    """Write the page and its Markdown; returns the names of the files."""
    page = Page(
        "Prepared data",
        f"{len(mix.sources)} sources, sequences of {mix.seq_length} tokens, vocabulary of {mix.vocab_size}, "
        f"seed {mix.seed}",
    )
    train = [source.train for source in mix.sources if source.train]
    held = [source.valid for source in mix.sources if source.valid]
    records, dropped = sum(count["records"] for count in counts), sum(count["quarantined"] for count in counts)
    page.tiles(
        [
            ("records read", [f"{records:,}"]),
            ("records kept", [percent(_kept(counts) / max(1, _documents(counts)))]),
            ("quarantined", [f"{dropped:,}"]),
            ("tokens to train on", [number(sum(split.tokens for split in train), 3)]),
            ("of them targets", [number(sum(split.target_tokens for split in train), 3)]),
            ("training sequences", [f"{sum(split.sequences for split in train):,}"]),
            ("held-out sequences", [f"{sum(split.sequences for split in held):,}"]),
        ]
    )
    page.section("Sequences", _sequence_table(mix))
    what = "Bar: share of the tokens that training will draw; mark: share of the prepared text."
    page.section("Mixture", _mixture_stack(mix), Text(what), _mixture_table(mix))
    page.section("Records", Text("What became of the records that were read."), _record_table(counts, plans))
    page.section("Quarantine", *_quarantine(plans, corpora))
    page.figures("Lengths", [_lengths(source, mix, corpus) for source, corpus in zip(mix.sources, corpora)])
    page.section(f"{RECORDS} records as the model will see them", *_samples(mix, decode))
    page.write(out / "report.html")
    return ["report.html", "report.md"]


def _documents(counts: list[dict[str, Any]]) -> int:
    return sum(sum(count["documents"].values()) for count in counts)


def _kept(counts: list[dict[str, Any]]) -> int:
    return sum(count["documents"]["kept"] for count in counts)


def _record_table(counts: list[dict[str, Any]], plans: list[Plan]) -> Table:
    statuses = list(counts[0]["documents"])
    rows: list[list[Cell]] = []
    for count, plan in zip(counts, plans):
        kept = [str(count["documents"][status]) for status in statuses]
        rest = [str(count["flagged as contaminated"]), str(count["control strings in text"])]
        records = [str(count["records"]), str(count["quarantined"])]
        rows.append([count["name"], str(len(plan.files)), size(plan.num_bytes), *records, *kept, *rest])
    return Table(["source", "files", "input", "records", "quarantined", *statuses, "flagged", "control strings"], rows)


def _sequence_table(mix: Mix) -> Table:
    rows: list[list[Cell]] = []
    for source in mix.sources:
        for name, split in source.splits:
            pairs = name.startswith("pairs/")
            filled = None if pairs else f"{split.tokens / (split.sequences * mix.seq_length):.2%}"
            counts = (split.documents, split.sequences, split.tokens, split.target_tokens)
            rows.append([source.name, source.kind, name.replace("pairs/", "pairs, "), *map(str, counts), filled])
    return Table(["source", "kind", "split", "documents", "sequences", "tokens", "targets", "filled"], rows)


def _trained(mix: Mix) -> list[tuple[int, Source, Split]]:
    return [(place, source, source.train) for place, source in enumerate(mix.sources) if source.train]


def _mixture_stack(mix: Mix) -> Figure:
    pieces = [(source.weight, place % 8, f"{source.name} {source.weight:.1%}") for place, source, _ in _trained(mix)]
    keys = "".join(key(f"{source.name} {source.weight:.1%}", place) for place, source, _ in _trained(mix))
    return Figure(join(stack(pieces), Html(f'<div class="legend">{keys}</div>')))


def _mixture_table(mix: Mix) -> Table:
    total = sum(split.tokens for _, _, split in _trained(mix))
    rows: list[list[Cell]] = []
    for place, source, split in _trained(mix):
        share, text = source.share, split.tokens / total
        asked = ", ".join(f"{name} {value:g}" for name, value in share.requested.items()) if share else None
        amount = [f"{share.tokens} {share.of}", seen(share.epochs)] if share else [None, None]
        drawn = bar(source.weight, place, text)
        rows.append([source.name, asked, f"{text:.2%}", f"{source.weight:.2%}", drawn, *amount])
    return Table(
        ["source", "asked for", "share of the text", "share of the mixture", "", "amount", "of its text"], rows
    )


def _quarantine(plans: list[Plan], corpora: list[Corpus]) -> list[Text | Table]:
    rows: list[list[Cell]] = []
    for plan, corpus in zip(plans, corpora):
        for reason, count in Counter(item.reason for item in corpus.bad).most_common(TOP_REASONS):
            some = [item for item in corpus.bad if item.reason == reason][:EXAMPLES]
            for place, item in enumerate(some):
                first = [plan.source, reason, str(count)] if place == 0 else ["", "", ""]
                where = f"{plan.files[item.file].path}:{item.line}"
                rows.append([*first, where, item.detail[:160]])
    if not rows:
        return [Text("Nothing: every record could be used.")]
    what = "Records that could not be used, with examples; quarantine.jsonl has all of them."
    return [Text(what), Table(["source", "reason", "records", "for example", "detail"], rows)]


def _lengths(source: Source, mix: Mix, corpus: Corpus) -> Figure:
    lengths = corpus.documents["tokens"]
    top = max(4, int(max(lengths.max(initial=1), mix.seq_length)).bit_length())
    edges = 2 ** np.arange(top + 1)
    counts = np.histogram(lengths, bins=edges)[0].astype(float).tolist()
    longer = float(np.count_nonzero(lengths > mix.seq_length)) / max(1, len(lengths))
    chart = bar_chart(
        f"{source.name}: documents by length",
        [number(float(edge), 3) for edge in edges[:-1]],
        {"documents": counts},
        "tokens, from",
        marks=[(float(np.log2(mix.seq_length)), f"seq_length {mix.seq_length}")],
    )
    middle = int(np.median(lengths)) if len(lengths) else 0
    return Figure(chart, source.name, f"documents by tokens; middle {middle}, {longer:.1%} longer than a sequence")


def _samples(mix: Mix, decode: Decode) -> list[Block]:
    """Records of every source, from the beginning, the middle and so on of its prefix."""
    blocks: list[Block] = [legend_block()]
    splits = [
        (source, source.pairs[0] or source.train or source.valid, bool(source.pairs[0])) for source in mix.sources
    ]
    each = max(1, RECORDS // max(1, len(splits)))
    for place, (source, split, paired) in enumerate(splits):
        if split is None:
            continue
        wanted = each + (place < RECORDS - each * len(splits))
        there = split.sequences // 2 if paired else split.sequences
        blocks.append(Figure(Html(""), title=source.name, what=source.kind))
        for index in sorted({int(i) for i in np.linspace(0, there - 1, min(wanted, there))}):
            blocks += record_blocks(split, index, decode, paired=paired, limit=TOKENS_SHOWN)
    return blocks
