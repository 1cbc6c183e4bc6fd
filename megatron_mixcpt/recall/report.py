"""report.md and report.html of a recall, and the fragment of preprocess.yaml that takes its result in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson

from megatron_mixcpt.recall.config import INSTRUCTIONS, RecallConfig
from megatron_mixcpt.report.page import Code, Page, Table, Text, bar, key
from megatron_mixcpt.units import number, percent

EXAMPLES = 10
CHARACTERS = 400
WEIGHTS = {"instructions": 0.2, "text": 0.1}


def fragment(config: RecallConfig, summary: dict[str, Any]) -> str:
    """Sources for preprocess.yaml that read what was kept."""
    lines = ["# For preprocess.yaml, beside your own source (of kind domain, weight: 0.7):"]
    for stream, counts in summary["streams"].items():
        if not counts["kept"]:
            continue
        path = json.dumps(str(Path(config.out) / f"{stream}.jsonl"))
        if stream == INSTRUCTIONS:
            what = 'kind: instruction, prompt: "{instruction}", response: "{response}"'
        else:
            what = 'kind: general, text: "{text}"'
        lines.append(f"  - {{name: recall-{stream}, paths: [{path}], {what}, weight: {WEIGHTS[stream]}}}")
    return "\n".join(lines)


def write_report(out: Path, summary: dict[str, Any]) -> None:
    """Write both reports from what recall.json will hold and the files beside it."""
    config = RecallConfig.model_validate(summary["config"])
    engine = "transformers" if config.engine.transformers else f"server, model {config.engine.openai.model}"  # type: ignore[union-attr]
    sampling = config.sampling
    page = Page(
        "What the model remembers",
        f"Written by {config.model.hf} (engine: {engine}), temperatures "
        f"{', '.join(f'{value:g}' for value in sampling.temperatures)}, top-p {sampling.top_p:g}, seed {sampling.seed}",
    )
    streams: dict[str, Any] = summary["streams"]
    page.tiles(
        [(f"{stream} kept", [f"{c['kept']:,} of {c['drawn']:,}"]) for stream, c in streams.items()]
        + [("tokens kept", [number(sum(c["tokens"] for c in streams.values()), 3)])]
    )
    page.section("Samples", _streams(streams), Text("Perplexity is of what was kept, under the model itself."))
    page.section("Rejected, by the first reason that applies", _rejections(streams))
    page.section("Ways and temperatures", _ways(streams))
    if summary["overlap"]:
        page.section("Overlap with given files", _overlap(summary["overlap"]))
    page.section(
        "Distinct word n-grams",
        _distinct(streams),
        Text("Different ones as a share of all, in the first 5000 samples kept."),
    )
    for stream, counts in streams.items():
        found = counts["clusters"]
        if found["groups"]:
            page.section(
                f"Topics of {stream}",
                _clusters(found["groups"]),
                Text(f"As many as {found['effective']:.1f} topics of equal size."),
            )
    for stream, counts in streams.items():
        if counts["kept"]:
            page.section(f"Examples: {stream}", _examples(out, stream, counts["kept"]))
    page.section("Next", Code(fragment(config, summary)))
    page.write(out / "report.html")


def _streams(streams: dict[str, Any]) -> Table:
    rows = [
        [key(stream, index), c["drawn"], c["kept"], percent(c["kept"] / c["drawn"]), bar(c["kept"] / c["drawn"], index),
         c["tokens"], None if c["median_perplexity"] is None else f"{c['median_perplexity']:.2f}"]
        for index, (stream, c) in enumerate(streams.items())
    ]  # fmt: skip
    return Table(["stream", "drawn", "kept", "share", "", "tokens kept", "median perplexity"], rows)


def _rejections(streams: dict[str, Any]) -> Table:
    reasons = next(iter(streams.values()))["rejected"]
    head = ["reason", *(name for stream in streams for name in (stream, "share"))]
    rows = [
        [reason, *(cell for c in streams.values() for cell in _part(c["rejected"][reason], c["drawn"]))]
        for reason in reasons
    ]
    return Table(head, rows)


def _ways(streams: dict[str, Any]) -> Table:
    rows = [
        [stream, way, counts["drawn"], *_part(counts.get("kept", 0), counts["drawn"])]
        for stream, c in streams.items()
        for way, counts in c["ways"].items()
    ]
    return Table(["stream", "way", "drawn", "kept", "share"], rows)


def _overlap(found: dict[str, Any]) -> Table:
    head = ["files", "samples searched", "with a common n-gram", "share", "mean share of n-grams", "rejected"]
    rows = [
        [name, c["samples"], *_part(c["with_common_ngrams"], c["samples"]), f"{c['mean_share']:.3%}",
         "yes" if c["rejected"] else "no, measured alone"]
        for name, c in found.items()
    ]  # fmt: skip
    return Table(head, rows)


def _distinct(streams: dict[str, Any]) -> Table:
    head = ["stream", *(f"{n}-grams" for n in next(iter(streams.values()))["distinct_ngrams"])]
    rows = [[stream, *(f"{share:.3f}" for share in c["distinct_ngrams"].values())] for stream, c in streams.items()]
    return Table(head, rows)


def _clusters(groups: list[dict[str, Any]]) -> Table:
    rows = [
        [percent(group["share"]), bar(group["share"], 0), ", ".join(group["words"]), _short(group["example"], 120)]
        for group in groups
    ]
    return Table(["share", "", "typical words", "in the middle"], rows)


def _examples(out: Path, stream: str, kept: int) -> Table:
    """Every (kept / EXAMPLES)-th sample, as it came."""
    keys = ["instruction", "response"] if stream == INSTRUCTIONS else ["text"]
    step = max(1, kept // EXAMPLES)
    rows: list[list[str]] = []
    with (out / f"{stream}.jsonl").open("rb") as file:
        for place, line in enumerate(file):
            if place % step == 0 and len(rows) < EXAMPLES:
                record = orjson.loads(line)
                rows.append([record["id"], f"{record['temperature']:g}", *(_short(record[name]) for name in keys)])
    return Table(["id", "temperature", *keys], rows)


def _part(amount: int, whole: int) -> list[str]:
    return [f"{amount:,}", percent(amount / whole) if whole else "–"]


def _short(text: str, characters: int = CHARACTERS) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= characters else flat[: characters - 1] + "…"
