"""The whole command on a very small model: exact for any split of the work and after any kill, ready to be prepared."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.config import validate
from megatron_mixcpt.data_prep.format import KIND_NAMES
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.recall.asking import Asker
from megatron_mixcpt.recall.config import RecallConfig
from megatron_mixcpt.recall.report import fragment
from megatron_mixcpt.recall.run import recall
from tests.recall.models import TEMPLATE, recall_values, save_chat_model

RESULTS = ("instructions.jsonl", "text.jsonl", "rejected.jsonl", "tokens.jsonl")


def configured(folder, model, /, **changes):
    return validate(RecallConfig, recall_values(folder, model, **changes), "test")


def result(config):
    from pathlib import Path

    return {name: (Path(config.out) / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def whole(chat_model, tmp_path_factory):
    """A run in one piece: configuration, what recall.json holds, files."""
    config = configured(tmp_path_factory.mktemp("whole"), chat_model)
    summary = recall(config)
    return config, summary, result(config)


def records(data):
    return [json.loads(line) for line in data.splitlines()]


def test_every_sample_is_kept_or_rejected_with_its_reason(whole):
    config, summary, files = whole
    rejected = records(files["rejected.jsonl"])
    for stream in ("instructions", "text"):
        counts = summary["streams"][stream]
        kept = records(files[f"{stream}.jsonl"])
        refused = [record for record in rejected if record["stream"] == stream]
        assert counts["drawn"] == config.amount(stream) == len(kept) + len(refused)
        assert counts["kept"] == len(kept) > 0
        for reason, count in counts["rejected"].items():
            assert count == sum(record["reason"] == reason for record in refused)
        ids = {record["id"] for record in [*kept, *refused]}
        assert ids == {f"{stream}-{number:07d}" for number in range(config.amount(stream))}
    assert rejected and all(record["detail"] for record in rejected)


def test_log_probabilities_of_what_is_kept_are_kept(whole):
    _, _, files = whole
    tokens = {record["id"]: record["parts"] for record in records(files["tokens.jsonl"])}
    kept = [*records(files["instructions.jsonl"]), *records(files["text.jsonl"])]
    assert tokens.keys() == {record["id"] for record in kept}
    for parts in tokens.values():
        for part in parts:
            assert len(part["logprobs"]) - len(part["tokens"]) in (0, 1)  # the ending token's
            assert max(part["logprobs"]) <= 0


def test_shards_of_several_ranks_make_the_same_bytes(whole, chat_model, tmp_path):
    config = configured(tmp_path, chat_model)
    assert recall(config, shard=(1, 2)) is None
    with pytest.raises(VerificationError, match="missing"):
        recall(config, assemble=True)
    for rank in (0, 1):
        recall(config, shard=(0, 2), rank=rank, world_size=2)
    recall(config, assemble=True)
    assert result(config) == whole[2]


def test_a_killed_run_goes_on_to_the_same_bytes_and_draws_nothing_twice(whole, chat_model, tmp_path):
    path = tmp_path / "recall.yaml"
    values = recall_values(tmp_path, chat_model)
    path.write_text(yaml.safe_dump(values))
    config = validate(RecallConfig, values, "test")
    command = [sys.executable, "-m", "megatron_mixcpt.cli", "recall", str(path)]

    def blocks():
        return sorted((tmp_path / "out" / ".samples").glob("*/*.jsonl"))

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(blocks()) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {block: block.stat().st_mtime_ns for block in blocks()}
    damaged = blocks()[0]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    recall(config)
    assert result(config) == whole[2]
    assert all(block.stat().st_mtime_ns == when for block, when in there.items() if block != damaged)


def test_a_larger_amount_draws_only_the_rest_and_changes_nothing_of_what_is_there(whole, chat_model, tmp_path):
    small = configured(tmp_path, chat_model, n={"instructions": 5, "text": 3})
    recall(small)
    blocks = list((tmp_path / "out" / ".samples").glob("*/*.jsonl"))
    before = {block: block.stat().st_mtime_ns for block in blocks}
    large = configured(tmp_path, chat_model)
    recall(large)
    assert result(large) == whole[2]
    assert all(block.stat().st_mtime_ns == when for block, when in before.items())


def test_another_seed_draws_other_samples(whole, chat_model, tmp_path):
    config = configured(tmp_path, chat_model)
    other = config.model_copy(update={"sampling": config.sampling.model_copy(update={"seed": 8})})
    recall(other)
    assert result(other)["text.jsonl"] != whole[2]["text.jsonl"]


def test_the_printed_fragment_is_what_preprocess_takes(whole, chat_model, tmp_path):
    from megatron_mixcpt.config import load_config
    from megatron_mixcpt.data_prep.config import PreprocessConfig
    from megatron_mixcpt.data_prep.pipeline import preprocess

    config, summary, _ = whole
    path = tmp_path / "preprocess.yaml"
    head = f"tokenizer: {chat_model}\nout: {tmp_path / 'data'}\nseq_length: 256\nvalid_fraction: 0\nsources:\n"
    path.write_text(head + fragment(config, summary))
    mix = json.loads(preprocess(load_config(PreprocessConfig, path, literal=True)).read_text())
    documents = {source["name"]: source["train"]["documents"] for source in mix["sources"]}
    assert {source["name"]: source["kind"] for source in mix["sources"]} == {
        "recall-instructions": "instruction",
        "recall-text": "general",
    }
    assert "general" in KIND_NAMES
    for stream in ("instructions", "text"):  # but for exact duplicates, none is lost
        assert 0 < documents[f"recall-{stream}"] <= summary["streams"][stream]["kept"]


def test_overlap_with_given_files_is_measured_and_can_be_refused(whole, chat_model, tmp_path):
    _, _, files = whole
    known = next(record for record in records(files["text.jsonl"]) if len(record["text"].split()) >= 3)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": known["text"]}) + "\n")
    (tmp_path / "docs.jsonl").write_text(json.dumps({"body": "nothing that it has ever said, by any chance"}) + "\n")
    overlap = {
        "evaluation": {"paths": [str(tmp_path / "eval.jsonl")], "ngram": 3},
        "domain": {"paths": [str(tmp_path / "docs.jsonl")], "ngram": 3, "action": "measure"},
    }
    config = configured(tmp_path, chat_model, overlap=overlap)
    summary = recall(config)
    refused = [record for record in records(result(config)["rejected.jsonl"]) if record["reason"] == "overlap"]
    assert known["id"] in {record["id"] for record in refused}
    assert summary["overlap"]["evaluation"]["with_common_ngrams"] == len(refused)
    assert summary["overlap"]["domain"]["with_common_ngrams"] == 0


def test_the_report_names_counts_reasons_and_the_next_step(whole):
    from pathlib import Path

    config, summary, _ = whole
    for name in ("report.md", "report.html"):
        text = (Path(config.out) / name).read_text()
        assert str(summary["streams"]["text"]["kept"]) in text
        assert "near duplicate" in text and "recall-instructions" in text
    assert (Path(config.out) / "provenance").is_dir()


def test_ranks_of_the_command_make_the_same_bytes_and_all_end_well(whole, chat_model, tmp_path, capfd):
    path = tmp_path / "recall.yaml"
    path.write_text(yaml.safe_dump(recall_values(tmp_path, chat_model)))
    assert main(["recall", str(path), "--nproc", "2"]) == 0
    assert result(configured(tmp_path, chat_model)) == whole[2]
    assert "recall-text" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no') }}", "fails on an ordinary conversation"),
        ("{{ messages[0]['content'] }}", "once each, in this order"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "no control token"),
    ],
)
def test_a_template_that_cannot_be_drawn_from_is_refused_with_the_fix(template, message, tmp_path):
    model = save_chat_model(tmp_path / "model", template=template)
    with pytest.raises(ConfigError, match=message):
        recall(configured(tmp_path, model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hf": "nowhere"}}, "no such directory"),
        ({"n": {"instructions": 0, "text": 0}}, "nothing to draw"),
        ({"engine": {}}, "exactly one"),
        ({"text": {"start_token": "heron"}}, "no control token"),
        ({"text": {"openings_file": "missing.txt"}}, "cannot be read"),
        ({"overlap": {"evaluation": {"paths": ["missing/*.jsonl"]}}}, "no file matches"),
        ({"filters": {"languages": ["klingon"]}}, "filters.languages"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(changes, message, chat_model, tmp_path):
    with pytest.raises(ConfigError, match=message):
        recall(configured(tmp_path, chat_model, **changes))
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_tokenizer_is_named(chat_model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((chat_model / "config.json").read_text())
    with pytest.raises(ConfigError, match="has no tokenizer"):
        recall(configured(tmp_path, tmp_path / "model"))


def test_a_full_disk_is_told_and_the_next_run_goes_on(whole, chat_model, tmp_path, monkeypatch, capsys):
    import errno
    import os

    path = tmp_path / "recall.yaml"
    path.write_text(yaml.safe_dump(recall_values(tmp_path, chat_model)))
    written = []

    def full(descriptor):
        if ".samples" in os.readlink(f"/proc/self/fd/{descriptor}"):
            written.append(descriptor)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main(["recall", str(path)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / ".samples").glob("*/*"))) == 1  # the first block, and nothing half written
    assert main(["recall", str(path)]) == 0
    assert result(configured(tmp_path, chat_model)) == whole[2]


def test_a_template_that_names_the_day_names_the_same_one_always(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    model = save_chat_model(tmp_path / "model", template=template)
    asker = Asker(configured(tmp_path, model))
    assert "01 Jan 2024" in asker._render([("user", "What day is it?")], answer=True)
