"""`mixcpt inspect` shows what is stored."""

import argparse
import html
import re
from pathlib import Path

import pytest

from megatron_mixcpt.cli import main
from megatron_mixcpt.commands import inspect as inspect_cli
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import open_indexed
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.show import markup, rich_text, runs_of
from megatron_mixcpt.data_prep.tokenizer import load_tokenizer
from megatron_mixcpt.errors import ConfigError
from tests.data_prep.helpers import load_mix, source_of


@pytest.fixture
def result(config_values) -> Path:
    config_values["sources"][1]["loss"] = "answer"
    preprocess(parse_config(config_values))
    return Path(config_values["out"])


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    inspect_cli.add_arguments(parser)
    return inspect_cli.run(parser.parse_args(list(words)))


def test_it_shows_every_prefix_or_the_one_asked_for(result, capsys):
    assert run(str(result), "--sample", "1") == 0
    shown = capsys.readouterr().out
    for name in ("docs train", "docs valid", "ask train", "pairs train", "pairs pairs/train"):
        assert name in shown
    prefix = source_of(load_mix(result), "ask")["train"]["prefix"]
    assert run(str(result / f"{prefix}.bin"), "--sequence", "0") == 0
    shown = capsys.readouterr().out
    assert "ask train" in shown and "sequence 0:" in shown and "docs train" not in shown


def test_it_names_what_there_is_when_asked_for_something_else(result):
    with pytest.raises(ConfigError, match="names no prefix 'nothing'"):
        run(str(result / "nothing"))
    prefix = source_of(load_mix(result), "ask")["train"]["prefix"]
    with pytest.raises(ConfigError, match="has sequences 0 to"):
        run(str(result / prefix), "--sequence", "100000")


def stored(result, tokenizer_dir, name, split):
    prefix = source_of(load_mix(result), name)[split]["prefix"]
    return (
        open_indexed(result / prefix)[0],
        open_indexed(result / f"{prefix}.flags")[0],
        load_tokenizer(tokenizer_dir).decode,
    )


def test_the_text_is_whole_and_styles_follow_the_mask(result, tokenizer_dir):
    tokens, flags, decode = stored(result, tokenizer_dir, "ask", "train")
    text = rich_text(*runs_of(tokens, flags, decode), colours=True)
    filled = tokens[(flags & 64) == 0].tolist()
    shown = text.plain.split("\n[")[0].replace("\n▮", "").replace("▮", "").replace("⏎\n", "\n")
    assert shown == decode(filled)
    styles = {span.style for span in text.spans}
    assert {"green", "green dim underline"} <= styles


def test_without_colours_targets_stand_in_brackets_and_on_a_page_in_boxes(result, tokenizer_dir):
    tokens, flags, decode = stored(result, tokenizer_dir, "ask", "train")
    runs, padding = runs_of(tokens, flags, decode)
    plain = rich_text(runs, padding, colours=False).plain
    marked = re.findall("⟦(.*?)⟧", plain, re.DOTALL)
    targets = tokens[(flags & 1) != 0].tolist()
    assert "".join(marked).replace("⏎\n", "\n") == decode(targets)
    boxes = [html.unescape(box) for box in re.findall(r"<b class='k1'>(.*?)</b>", markup(runs, padding), re.DOTALL)]
    assert "".join(boxes).replace("⏎\n", "\n") == decode(targets) and len(boxes) == len(targets)


def test_a_preference_pair_is_shown_whole_side_by_side_and_as_a_page(result, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    prefix = source_of(load_mix(result), "pairs")["pairs"]["train"]["prefix"]
    assert run(str(result / prefix), "--sequence", "0") == 0
    shown = capsys.readouterr().out
    assert "pair 0" in shown and re.search(r"chosen: .*rejected: .*", shown)
    assert any(line.count("⟦") == 2 for line in shown.splitlines()), "both answers in one line"
    out = tmp_path / "pairs.html"
    assert run(str(result / prefix), "--sample", "2", "--html", str(out)) == 0
    assert out.read_text().count('class="pair"') == 2 and "rejected: " in out.read_text()
    with pytest.raises(ConfigError, match="has pairs 0 to"):
        run(str(result / prefix), "--sequence", "100000")


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: neither a folder"):
        run(str(tmp_path / "nowhere"))


def test_a_view_of_data_with_a_bare_tokenizer_is_shown(config_values, tokenizer_dir, tmp_path, capsys):
    """Its manifest has no settings of preprocessing, and the tokenizer's own file names no end of a document."""
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    preprocess(parse_config(config_values | {"tokenizer": str(alone), "eos_token": "<|endoftext|>"}))
    assert main(["mix", config_values["out"], "--out", str(tmp_path / "view"), "--drop", "ask"]) == 0
    capsys.readouterr()
    assert run(str(tmp_path / "view"), "--sample", "1") == 0
    shown = capsys.readouterr().out
    assert "docs train" in shown and "ask train" not in shown
