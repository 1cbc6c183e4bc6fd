"""Reports say what happened, in numbers that agree with the data."""

import json
import re
from pathlib import Path

import pytest

from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.report.figures import bar_chart
from tests.data_prep.helpers import load_mix, source_of


@pytest.fixture
def result(config_values, corpus) -> Path:
    lines = corpus["domain"].read_text().splitlines()
    awkward = json.dumps({"body|": "<b>&"})
    corpus["domain"].write_text("\n".join([*lines, lines[0], '{"text": "a <|endoftext|> b"}', awkward]) + "\n")
    config_values["sources"][0]["max_bad_fraction"] = 0.01
    preprocess(parse_config(config_values))
    return Path(config_values["out"])


def rows_of(text: str, title: str) -> list[list[str]]:
    """The rows of a Markdown table, each cut at its unescaped bars."""
    part = text.split(f"## {title}\n\n")[1].split("\n## ")[0]
    table = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.replace("\\|", "¦").strip("|").split("|")] for row in table]


def test_the_numbers_are_those_of_the_data(result):
    text, mix = (result / "report.md").read_text(), load_mix(result)
    docs = rows_of(text, "Records")[0]
    # source, files, input, records, quarantined, kept, short, long, contaminated, duplicate, near, flagged, control
    assert docs[:2] == ["docs", "1"] and docs[3:] == ["403", "1", "401", "0", "0", "0", "1", "0", "0", "1"]
    for name, kind, split, documents, sequences, tokens, targets, filled in rows_of(text, "Sequences"):
        source = source_of(mix, name)
        assert kind == source["kind"]
        entry = source["pairs"][split.split(", ")[1]] if "," in split else source[split]
        wanted = [entry[key] for key in ("documents", "sequences", "tokens", "target_tokens")]
        assert [int(documents), int(sequences), int(tokens), int(targets)] == wanted
        if "," not in split:
            assert filled == f"{entry['tokens'] / entry['sequences'] / mix['seq_length']:.2%}"
    assert [row[3] for row in rows_of(text, "Mixture")] == ["70.00%", "20.00%", "10.00%"]
    ((source, reason, number, place, detail),) = rows_of(text, "Quarantine")
    assert (source, reason, number) == ("docs", "missing key", "1") and place.endswith("domain.jsonl:403")
    assert "body¦" in detail


def test_the_page_shows_shares_lengths_and_records_with_their_masks_and_escapes_the_data(result):
    page = (result / "report.html").read_text()
    assert "body|" in page and "<b>&" not in page
    assert page.count("seq_length ") >= 3 and "records as the model will see them" in page
    assert len(re.findall('<p class="soft small">(?:sequence|pair) [0-9]+', page)) == 10
    assert page.count('class="pair"') >= 3 and "<b class='k1'>" in page and "<s class='k1'>" in page
    for name, share in (("docs", 70.0), ("ask", 20.0), ("pairs", 10.0)):
        assert f"{name} {share:.1f}%" in page


def test_the_pages_bytes_do_not_depend_on_the_time(result, config_values):
    before = (result / "report.html").read_bytes()
    assert not re.search(rb"20\d\d-\d\d-\d\d|\d:\d\d\b", before.split(b"<footer>")[1])
    (result / "report.html").unlink()
    preprocess(parse_config(config_values))
    assert (result / "report.html").read_bytes() == before


def test_bars_are_as_high_as_their_values():
    chart = bar_chart("a & b", ["x", "y"], {"one": [1, 4], "two": [2, 0]})
    found = re.findall(r'height="([^"]+)"><title>([^<]+)', chart)
    heights = {title: float(height) for height, title in found}
    assert heights["y, one: 4"] == pytest.approx(4 * heights["x, one: 1"], abs=0.2)
    assert heights["x, two: 2"] == pytest.approx(heights["y, one: 4"] / 2, abs=0.1) and heights["y, two: 0"] == 0
