"""report.md and report.html of a recall, and the fragment of preprocess.yaml that takes its result in."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import orjson

from megatron_mixcpt.recall.config import INSTRUCTIONS, RecallConfig
from megatron_mixcpt.recall.store import whole_file

Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""
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
    tables = [
        _streams(summary),
        _rejections(summary),
        _ways(summary),
        *_overlap(summary),
        _distinct(summary),
        *(_clusters(stream, counts) for stream, counts in summary["streams"].items()),
        *(_examples(out, stream, counts["kept"]) for stream, counts in summary["streams"].items()),
    ]
    tables = [table for table in tables if table[2]]
    engine = "transformers" if config.engine.transformers else f"server, model {config.engine.openai.model}"  # type: ignore[union-attr]
    sampling = config.sampling
    intro = (
        f"Written by {config.model.hf} (engine: {engine}), temperatures "
        f"{', '.join(f'{value:g}' for value in sampling.temperatures)}, top-p {sampling.top_p:g}, seed {sampling.seed}."
    )
    sources = fragment(config, summary)
    for name, content in (
        ("report.md", _markdown(intro, tables, sources)),
        ("report.html", _html(intro, tables, sources)),
    ):
        with whole_file(out / name) as file:
            file.write(content.encode())


def _streams(summary: dict[str, Any]) -> Table:
    rows = [
        [stream, str(c["drawn"]), str(c["kept"]), _percent(c["kept"], c["drawn"]), str(c["tokens"]),
         "" if c["median_perplexity"] is None else f"{c['median_perplexity']:.2f}"]
        for stream, c in summary["streams"].items()
    ]  # fmt: skip
    return "Samples", ["stream", "drawn", "kept", "share", "tokens kept", "median perplexity under itself"], rows


def _rejections(summary: dict[str, Any]) -> Table:
    streams = summary["streams"]
    reasons = next(iter(streams.values()))["rejected"]
    rows = [
        [
            reason,
            *(f"{c['rejected'][reason]} ({_percent(c['rejected'][reason], c['drawn'])})" for c in streams.values()),
        ]
        for reason in reasons
    ]
    return "Rejected, by the first reason that applies", ["reason", *streams], rows


def _ways(summary: dict[str, Any]) -> Table:
    rows = [
        [
            stream,
            way,
            str(counts["drawn"]),
            str(counts.get("kept", 0)),
            _percent(counts.get("kept", 0), counts["drawn"]),
        ]
        for stream, c in summary["streams"].items()
        for way, counts in c["ways"].items()
    ]
    return "Ways and temperatures", ["stream", "way", "drawn", "kept", "share"], rows


def _overlap(summary: dict[str, Any]) -> list[Table]:
    head = ["files", "samples searched", "with a common n-gram", "mean share of n-grams", "rejected"]
    rows = [
        [name, str(c["samples"]), f"{c['with_common_ngrams']} ({_percent(c['with_common_ngrams'], c['samples'])})",
         f"{c['mean_share']:.3%}", "yes" if c["rejected"] else "no, measured alone"]
        for name, c in summary["overlap"].items()
    ]  # fmt: skip
    return [("Overlap with given files", head, rows)]


def _distinct(summary: dict[str, Any]) -> Table:
    rows = [
        [stream, *(f"{share:.3f}" for share in c["distinct_ngrams"].values())]
        for stream, c in summary["streams"].items()
    ]
    head = ["stream", *(f"{n}-grams" for n in next(iter(summary["streams"].values()))["distinct_ngrams"])]
    return "Distinct word n-grams (share, over the first 5000 samples that were kept)", head, rows


def _clusters(stream: str, counts: dict[str, Any]) -> Table:
    found = counts["clusters"]
    rows = [
        [f"{group['share']:.1%}", ", ".join(group["words"]), _short(group["example"], 120)] for group in found["groups"]
    ]
    title = f"What {stream} are about (effective number of clusters: {found['effective']:.1f})"
    return title, ["share", "typical words", "in the middle"], rows


def _examples(out: Path, stream: str, kept: int) -> Table:
    """Every (kept / EXAMPLES)-th sample, as it came."""
    keys = ["instruction", "response"] if stream == INSTRUCTIONS else ["text"]
    step = max(1, kept // EXAMPLES)
    rows: list[list[str]] = []
    with (out / f"{stream}.jsonl").open("rb") as file:
        for number, line in enumerate(file):
            if number % step == 0 and len(rows) < EXAMPLES:
                record = orjson.loads(line)
                rows.append([record["id"], f"{record['temperature']:g}", *(_short(record[key]) for key in keys)])
    return f"Examples: {stream}", ["id", "temperature", *keys], rows


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _short(text: str, characters: int = CHARACTERS) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= characters else flat[: characters - 1] + "…"


def _markdown(intro: str, tables: list[Table], sources: str) -> str:
    lines = ["# What the model remembers", "", intro, ""]
    for title, head, rows in tables:
        lines += [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, "## Next", "", "```yaml", sources, "```", ""])


def _html(intro: str, tables: list[Table], sources: str) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>What the model remembers</title>",
        "<style>body{font-family:sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:3px 8px;text-align:left;vertical-align:top}</style>",
        f"<h1>What the model remembers</h1><p>{escape(intro)}</p>",
    ]
    for title, head, rows in tables:
        parts.append(f"<h2>{escape(title)}</h2><table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head))
        parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        parts.append("</table>")
    return "\n".join([*parts, f"<h2>Next</h2><pre>{escape(sources)}</pre></html>"]) + "\n"
