"""Held-out text: named files, sources that are only measured, and pieces of texts of which there are too few."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import TARGET
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.verify import verify
from megatron_mixcpt.data_prep.views import ShareRequest, remix
from megatron_mixcpt.errors import BadRecordsError, ConfigError
from tests.data_prep.helpers import documents_of, load_mix, sequences_of, source_of


def run(values: dict) -> tuple[Path, dict]:
    preprocess(parse_config(values))
    out = Path(values["out"])
    return out, load_mix(out)


def texts(count: int, word: str) -> list[dict]:
    return [{"text": f"{word} number {i} " * (i % 7 + 1)} for i in range(count)]


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def contents(out: Path, split: dict | None) -> set[bytes]:
    return {tokens.tobytes() for tokens, _ in documents_of(out, split["prefix"])} if split else set()


def test_named_files_are_held_out_whole_and_nothing_of_them_is_trained_on(config_values, corpus, tmp_path):
    docs = config_values["sources"][0]
    repeated = corpus["domain"].read_text().splitlines()[:5]
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(repeated) + "\n" + Path(write(tmp_path / "own.jsonl", texts(20, "held"))).read_text())
    docs["heldout"] = [str(held)]
    out, mix = run(config_values)
    source = source_of(mix, "docs")
    # What stands in both files is measured, not trained on.
    assert source["valid"]["documents"] == 25 and source["train"]["documents"] == 395
    assert not contents(out, source["valid"]) & contents(out, source["train"])
    assert verify(out, sample=60).problems == []


def test_pieces_of_texts_are_held_out_also_where_whole_ones_were_prepared_before(config_values, tmp_path):
    """Row numbers mean other things then, and may be the same."""
    docs = config_values["sources"][0]
    docs["paths"] = [write(tmp_path / "one.jsonl", [{"text": " ".join(f"w{i}" for i in range(30))}])]
    config_values |= {"sources": [docs], "seq_length": 16}
    for seed in range(4):
        out = tmp_path / f"out-{seed}"
        before, _ = run(config_values | {"out": str(out), "seed": seed, "valid_fraction": 0.0})
        after, mix = run(config_values | {"out": str(out), "seed": seed, "valid_fraction": 0.02})
        _, fresh = run(config_values | {"out": str(tmp_path / f"fresh-{seed}"), "seed": seed, "valid_fraction": 0.02})
        assert before == after
        assert source_of(mix, "docs")["train"]["tokens"] == source_of(fresh, "docs")["train"]["tokens"]


def test_a_source_may_be_held_out_only(config_values, tmp_path):
    path = write(tmp_path / "general.jsonl", texts(30, "general"))
    general = {"name": "general", "kind": "general", "heldout": [path], "text": "{text}"}
    config_values["sources"].append(general)
    out, mix = run(config_values)
    source = source_of(mix, "general")
    assert source["train"] is None and source["valid"]["documents"] == 30 and source["weight"] == 0.0
    assert sum(each["weight"] for each in mix["sources"]) == pytest.approx(1)
    assert verify(out, sample=60).problems == []
    whole = read_mix(out)
    assert [each.name for each in whole.train_sources] == ["docs", "ask", "pairs"]
    view = read_mix(remix(out, tmp_path / "view", {"docs": ShareRequest(weight=0.5)}))
    assert view.sources[3].valid is not None and view.sources[3].train is None
    with pytest.raises(ConfigError, match="only held out"):
        remix(out, tmp_path / "other", {"general": ShareRequest(weight=0.5)})


@pytest.mark.parametrize("total", [1.0, 2.0])
def test_a_source_that_is_only_held_out_leaves_the_weights_as_free_as_without_it(config_values, tmp_path, total):
    weights = [source["weight"] for source in config_values["sources"]]
    for source in config_values["sources"]:
        source["weight"] *= total / sum(weights)
    path = write(tmp_path / "general.jsonl", texts(30, "general"))
    config_values["sources"].append({"name": "general", "kind": "general", "heldout": [path], "text": "{text}"})
    _, mix = run(config_values)
    assert [each["weight"] for each in mix["sources"]] == pytest.approx([w / sum(weights) for w in weights] + [0], 1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": []}, "give paths, or heldout"),
        ({"paths": [], "heldout": ["x"]}, "only measured and takes no weight"),
        ({"too_long": "truncate"}, "makes no sense for a domain source"),
    ],
)
def test_what_does_not_fit_together_is_refused(config_values, changes, message):
    config_values["sources"][0].update(changes)
    with pytest.raises(ConfigError, match=message):
        parse_config(config_values)


def test_a_file_cannot_be_trained_on_and_held_out(config_values):
    config_values["sources"][0]["heldout"] = config_values["sources"][0]["paths"]
    with pytest.raises(ConfigError, match="in paths and in heldout"):
        preprocess(parse_config(config_values))


@pytest.mark.parametrize("layout", ["pack", "concat"])
def test_a_single_long_text_still_gives_a_validation_set(config_values, tmp_path, capfd, layout):
    text = tmp_path / "book.txt"
    text.write_text(" ".join(record["text"] for record in texts(300, "chapter")))
    config_values["sources"] = [
        {"name": "book", "kind": "domain", "paths": [str(text)], "text": "{text}", "weight": 1, "layout": layout}
    ]
    out, mix = run(config_values)
    source = source_of(mix, "book")
    assert "pieces of 128 tokens are" in capfd.readouterr().err
    valid, train = (source[split] for split in ("valid", "train"))
    assert 0 < valid["tokens"] < 0.4 * train["tokens"]
    # Nothing is lost or doubled: the pieces are those that the text is cut into without a validation set.
    config_values |= {"valid_fraction": 0, "out": str(tmp_path / "whole")}
    whole_out, whole = run(config_values)
    assert source_of(whole, "book")["train"]["tokens"] == valid["tokens"] + train["tokens"]
    if layout == "pack":
        pieces = contents(out, valid) | contents(out, train)
        assert pieces == contents(whole_out, source_of(whole, "book")["train"])
    assert verify(out, sample=1000).problems == []


def long_conversations(path: Path) -> list[dict]:
    records = [{"instruction": f"Say {i}?", "response": "the liver " * (200 if i % 5 == 0 else 3)} for i in range(60)]
    records.append({"instruction": "the patient " * 200, "response": "no."})  # its answer lies beyond the limit
    write(path, records)
    return records


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_conversations_that_do_not_fit_are_no_bad_records(config_values, tmp_path, too_long):
    records = long_conversations(tmp_path / "ask.jsonl")
    ask = {**config_values["sources"][1], "paths": [str(tmp_path / "ask.jsonl")], "weight": 1, "max_bad_fraction": 0}
    config_values["sources"] = [{**ask, "too_long": too_long, "loss": "answer"}]
    out, mix = run(config_values)
    counts = json.loads((out / "manifest.json").read_text())["sources"][0]
    expected = 1 if too_long == "truncate" else 13
    assert (counts["quarantined"], counts["longer than seq_length"]) == (0, expected)
    source = source_of(mix, "ask")
    assert source["train"]["documents"] + source["valid"]["documents"] == len(records) - expected
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == expected
    for tokens, flags in documents_of(out, source["train"]["prefix"]):
        assert len(tokens) <= 128 and (flags & TARGET).any()
    full = [len(tokens) for tokens, _ in documents_of(out, source["train"]["prefix"])].count(128)
    assert (full > 5) == (too_long == "truncate")
    assert verify(out, sample=100).problems == []


def test_a_conversation_that_does_not_fit_can_end_the_run(config_values, tmp_path):
    long_conversations(tmp_path / "ask.jsonl")
    config_values["sources"][1] |= {"paths": [str(tmp_path / "ask.jsonl")], "too_long": "error"}
    with pytest.raises(BadRecordsError, match=r"13 records do not fit .*ask.jsonl:1: .*too_long: drop or truncate"):
        preprocess(parse_config(config_values))


def test_pairs_are_cut_in_their_last_answers_alone(config_values, tmp_path):
    records = [{"prompt": f"Who, {i}?", "chosen": "a liver " * 200, "rejected": f"no {i}"} for i in range(30)]
    records += [{"prompt": "why " * 300, "chosen": "yes", "rejected": f"no {i}"} for i in range(3)]
    path = write(tmp_path / "pairs.jsonl", records)
    config_values["sources"] = [{**config_values["sources"][2], "paths": [path], "weight": 1, "too_long": "truncate"}]
    out, mix = run(config_values)
    pairs = source_of(mix, "pairs")["pairs"]
    assert sum(pairs[split]["documents"] for split in pairs if pairs[split]) == 30
    assert verify(out, sample=100).problems == []
    lengths = np.array([len(tokens) for tokens, _ in sequences_of(out, pairs["train"]["prefix"])])
    assert (lengths[::2] == 128).all() and (lengths[1::2] < 40).all()
