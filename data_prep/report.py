"""`report.md` and `report.html`: what went in, what was dropped and why, and what the mixture is made of."""

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.assemble import Corpus
from megatron_mixcpt.data_prep.charts import bar_chart, short
from megatron_mixcpt.data_prep.explain import seen
from megatron_mixcpt.data_prep.mix import SPLITS
from megatron_mixcpt.data_prep.plan import Plan

FOLDER = "report"
TOP_REASONS = 8
Table = tuple[list[str], list[list[str]]]


def write_report(
    out: Path, mix: dict[str, Any], counts: list[dict[str, Any]], plans: list[Plan], corpora: list[Corpus]
) -> list[str]:
    """Write both reports and their charts; returns the names of the files."""
    charts = _charts(mix, corpora)
    tables = {
        "Records": _record_table(counts, plans),
        "Sequences": _sequence_table(mix),
        "Mixture": _mixture_table(mix),
        "Quarantine": _quarantine_table(plans, corpora),
    }
    intro = (
        f"{len(mix['sources'])} sources, sequences of {mix['seq_length']} tokens, vocabulary of "
        f"{mix['tokenizer']['vocab_size']}, seed {mix['seed']}."
    )
    (out / FOLDER).mkdir(exist_ok=True)
    files = {f"{FOLDER}/{name}.svg": chart for name, chart in charts.items()}
    files["report.md"] = _markdown(intro, tables, charts)
    files["report.html"] = _html(intro, tables, charts)
    for name, content in files.items():
        (out / name).write_text(content, encoding="utf-8")
    return list(files)


def _record_table(counts: list[dict[str, Any]], plans: list[Plan]) -> Table:
    statuses = list(counts[0]["documents"])
    head = ["source", "files", "input", "records", "quarantined", *statuses, "flagged", "control strings"]
    rows = []
    for count, plan in zip(counts, plans):
        kept = [str(count["documents"][status]) for status in statuses]
        rest = [str(count["flagged as contaminated"]), str(count["control strings in text"])]
        size = short(plan.num_bytes) + "B"
        rows.append(
            [count["name"], str(len(plan.files)), size, str(count["records"]), str(count["quarantined"]), *kept, *rest]
        )
    return head, rows


def _sequence_table(mix: dict[str, Any]) -> Table:
    head = ["source", "split", "documents", "sequences", "tokens", "targets", "filled"]
    rows = []
    for source in mix["sources"]:
        for split in SPLITS:
            entry = source[split]
            if entry is not None:
                filled = entry["tokens"] / (entry["sequences"] * mix["seq_length"])
                numbers = [str(entry[key]) for key in ("documents", "sequences", "tokens", "target_tokens")]
                rows.append([source["name"], split, *numbers, f"{filled:.2%}"])
        for split, entry in (source.get("pairs") or {}).items():
            if entry is not None:
                numbers = [str(entry[key]) for key in ("documents", "sequences", "tokens", "target_tokens")]
                rows.append([source["name"], f"pairs, {split}", *numbers, "-"])
    return head, rows


def _mixture_table(mix: dict[str, Any]) -> Table:
    head = ["source", "asked for", "share of the text", "share of the mixture", "amount", "of its text"]
    sources = [source for source in mix["sources"] if source["train"] is not None]
    total = sum(source["train"]["tokens"] for source in sources)
    rows = []
    for source in sources:
        share = source["share"]
        asked = ", ".join(f"{key} {value:g}" for key, value in share["requested"].items())
        rows.append(
            [
                source["name"],
                asked,
                f"{source['train']['tokens'] / total:.2%}",
                f"{source['weight']:.2%}",
                f"{share['tokens']} {share['of']}",
                seen(share["epochs"]),
            ]
        )
    return head, rows


def _quarantine_table(plans: list[Plan], corpora: list[Corpus]) -> Table:
    rows = []
    for plan, corpus in zip(plans, corpora):
        items = [item for receipt in corpus.receipts for item in receipt["bad"]]
        for reason, number in Counter(item["reason"] for item in items).most_common(TOP_REASONS):
            first = next(item for item in items if item["reason"] == reason)
            place = f"{plan.files[first['file']].path}:{first['line']}"
            rows.append([plan.source, reason, str(number), place, first["detail"][:120]])
    return ["source", "reason", "records", "first at", "detail"], rows


def _charts(mix: dict[str, Any], corpora: list[Corpus]) -> dict[str, str]:
    charts = {}
    sources = [source for source in mix["sources"] if source["train"] is not None]
    names = [source["name"] for source in sources]
    total = sum(source["train"]["tokens"] for source in sources)
    shares = {
        "in the text": [100 * source["train"]["tokens"] / total for source in sources],
        "in the mixture": [100 * source["weight"] for source in sources],
    }
    charts["mixture"] = bar_chart("Share of tokens", names, shares, "%")
    fill = [100 * source["train"]["tokens"] / (source["train"]["sequences"] * mix["seq_length"]) for source in sources]
    charts["fill"] = bar_chart("Sequences filled with text", names, {"filled": fill}, "%")
    for name, corpus in zip([source["name"] for source in mix["sources"]], corpora):
        lengths = corpus.documents["tokens"]
        top = max(4, int(lengths.max(initial=1)).bit_length())
        edges = 2 ** np.arange(top + 1)
        histogram = np.histogram(lengths, bins=edges)[0].astype(float).tolist()
        labels = [short(float(edge)) for edge in edges[:-1]]
        charts[f"lengths-{name}"] = bar_chart(f"{name}: documents by tokens, from", labels, {"documents": histogram})
    return charts


def _markdown(intro: str, tables: dict[str, Table], charts: dict[str, str]) -> str:
    lines = ["# Prepared data", "", intro, ""]
    for title, (head, rows) in tables.items():
        lines += [f"## {title}", ""]
        if rows:
            lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            lines += [
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
            ]
        else:
            lines.append("Nothing.")
        lines.append("")
    lines += ["## Charts", "", *(f"![{name}]({FOLDER}/{name}.svg)" for name in charts), ""]
    return "\n".join(lines)


def _html(intro: str, tables: dict[str, Table], charts: dict[str, str]) -> str:
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Prepared data</title>",
        "<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:3px 8px;text-align:left}</style>",
        f"<h1>Prepared data</h1><p>{escape(intro)}</p>",
    ]
    for title, (head, rows) in tables.items():
        parts.append(f"<h2>{title}</h2>")
        if not rows:
            parts.append("<p>Nothing.</p>")
            continue
        parts.append("<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append("</table>")
    parts.append("<h2>Charts</h2>")
    return "\n".join([*parts, *charts.values()]) + "\n"
