"""Reports say what happened, in numbers that agree with the data."""

import json
import xml.dom.minidom
from pathlib import Path

import pytest

from megatron_mixcpt.data_prep.charts import bar_chart, short
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
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
    table = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.replace("\\|", "¦").strip("|").split("|")] for row in table]


def test_the_numbers_are_those_of_the_data(result):
    text, mix = (result / "report.md").read_text(), load_mix(result)
    docs = rows_of(text, "Records")[0]
    # source, files, input, records, quarantined, kept, short, long, contaminated, duplicate, near, flagged, control
    assert docs[:2] == ["docs", "1"] and docs[3:] == ["403", "1", "401", "0", "0", "0", "1", "0", "0", "1"]
    for name, split, documents, sequences, tokens, targets, filled in rows_of(text, "Sequences"):
        source = source_of(mix, name)
        entry = source["pairs"][split.split(", ")[1]] if "," in split else source[split]
        wanted = [entry[key] for key in ("documents", "sequences", "tokens", "target_tokens")]
        assert [int(documents), int(sequences), int(tokens), int(targets)] == wanted
        if "," not in split:
            assert filled == f"{entry['tokens'] / entry['sequences'] / mix['seq_length']:.2%}"
    assert [row[3] for row in rows_of(text, "Mixture")] == ["70.00%", "20.00%", "10.00%"]
    ((source, reason, number, place, detail),) = rows_of(text, "Quarantine")
    assert (source, reason, number) == ("docs", "missing key", "1") and place.endswith("domain.jsonl:403")
    assert "body¦" in detail


def test_html_escapes_what_comes_from_the_data_and_charts_are_valid(result):
    html = (result / "report.html").read_text()
    assert "body|" in html and "<b>" not in html
    names = sorted(path.stem for path in (result / "report").glob("*.svg"))
    assert names == ["fill", "lengths-ask", "lengths-docs", "lengths-pairs", "mixture"]
    for name in names:
        xml.dom.minidom.parse(str(result / "report" / f"{name}.svg"))
        assert f"report/{name}.svg" in (result / "report.md").read_text()


def test_bars_are_as_high_as_their_values():
    chart = bar_chart("a & b", ["x", "y"], {"one": [1, 4], "two": [2, 0]})
    document = xml.dom.minidom.parseString(chart)
    heights = {}
    for title in document.getElementsByTagName("title"):
        heights[title.firstChild.data] = float(title.parentNode.getAttribute("height"))
    assert heights["one y: 4"] == pytest.approx(4 * heights["one x: 1"], abs=0.2)
    assert heights["two x: 2"] == pytest.approx(heights["one y: 4"] / 2, abs=0.1) and heights["two y: 0"] == 0


@pytest.mark.parametrize("value, text", [(0, "0"), (999, "999"), (1500, "1.5k"), (2_340_000, "2.34M"), (7e9, "7G")])
def test_short_numbers(value, text):
    assert short(value) == text
