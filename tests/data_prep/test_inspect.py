"""`mixcpt inspect` shows what is stored."""

import argparse
from pathlib import Path

import pytest

from megatron_mixcpt.commands import inspect as inspect_cli
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import open_indexed
from megatron_mixcpt.data_prep.pipeline import preprocess
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


def test_the_text_is_whole_and_styles_follow_the_mask(result, tokenizer_dir):
    prefix = source_of(load_mix(result), "ask")["train"]["prefix"]
    tokens, flags = open_indexed(result / prefix)[0], open_indexed(result / f"{prefix}.flags")[0]
    decode = load_tokenizer(tokenizer_dir).decode
    text = inspect_cli.render_sequence(tokens, flags, decode)
    filled = tokens[(flags & 64) == 0].tolist()
    shown = text.plain.split("\n[")[0].replace("\n▮", "").replace("▮", "").replace("⏎\n", "\n")
    assert shown == decode(filled)
    styles = {span.style for span in text.spans}
    assert {"green", "green dim underline"} <= styles


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: neither a folder"):
        run(str(tmp_path / "nowhere"))
