"""`mixcpt verify` finds every kind of damage, also damage that hashes were made to agree with."""

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megatron_mixcpt.commands import verify as verify_cli
from megatron_mixcpt.data_prep.assemble import content_hash
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import PAD, TARGET, open_indexed
from megatron_mixcpt.data_prep.manifest import describe_file
from megatron_mixcpt.data_prep.mix import fingerprint
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.verify import verify
from megatron_mixcpt.errors import MixcptError, VerificationError
from tests.data_prep.helpers import load_mix, source_of


@pytest.fixture
def result(config_values) -> Path:
    preprocess(parse_config(config_values))
    return Path(config_values["out"])


def reseal(out: Path, entry_of) -> None:
    """Make all hashes and names agree with files that were changed, as a clever mistake would."""
    mix, manifest = load_mix(out), json.loads((out / "manifest.json").read_text())
    entry = entry_of(mix)
    old = entry["prefix"]
    hashes = [describe_file(out / (old + ending)).hash for ending in (".bin", ".flags.bin")]
    shape = "pairs" if "pairs-" in old else str(mix["seq_length"])
    entry["hash"] = content_hash(hashes, shape)
    entry["prefix"] = old[:-12] + entry["hash"][:12]
    for ending in (".bin", ".idx", ".flags.bin", ".flags.idx"):
        os.replace(out / (old + ending), out / (entry["prefix"] + ending))
        manifest["files"].pop(old + ending)
        manifest["files"][entry["prefix"] + ending] = asdict(describe_file(out / (entry["prefix"] + ending)))
    (out / "manifest.json").write_text(json.dumps(manifest))
    mix["fingerprint"] = fingerprint(mix)
    (out / "mix.json").write_text(json.dumps(mix))


def test_a_good_result_passes_and_records_are_traced(result):
    findings = verify(result, sample=30)
    assert findings.problems == [] and findings.notes == []
    assert findings.num_records >= 30 and findings.num_prefixes == 8


def test_a_concatenated_layout_is_traced_too(config_values):
    config_values["sources"][0]["layout"] = "concat"
    preprocess(parse_config(config_values))
    findings = verify(config_values["out"], sample=100)
    assert findings.problems == [] and findings.num_records >= 100


def test_every_flipped_byte_in_every_file_is_found(result):
    rng = np.random.default_rng(0)
    for name in json.loads((result / "manifest.json").read_text())["files"]:
        path = result / name
        data = path.read_bytes()
        if not data:
            continue
        at = int(rng.integers(len(data)))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert any(name in problem for problem in verify(result, sample=0).problems), name
        path.write_bytes(data[:-1])
        assert any(name in problem for problem in verify(result, sample=0).problems), name
        path.write_bytes(data)
    assert verify(result, sample=0).problems == []


def test_leftovers_of_an_earlier_run_are_named(result, config_values):
    old = source_of(load_mix(result), "docs")["train"]["prefix"]
    preprocess(parse_config({**config_values, "seed": 99}))
    findings = verify(result, sample=0)
    assert findings.problems == [] and any("left over from earlier runs" in note for note in findings.notes)
    assert (result / f"{old}.bin").exists()


def test_missing_and_edited_files_are_found(result):
    text = (result / "mix.json").read_text()
    (result / "mix.json").write_text(text.replace('"weight": 0.7', '"weight": 0.8'))
    with pytest.raises(VerificationError, match="not by hand"):
        verify(result)
    (result / "mix.json").write_text(text)
    prefix = source_of(load_mix(result), "ask")["train"]["prefix"]
    (result / f"{prefix}.flags.idx").unlink()
    problems = verify(result, sample=0).problems
    assert any("is missing" in problem for problem in problems)
    shutil.rmtree(result)
    with pytest.raises(MixcptError, match="no such file"):
        verify(result)


def flags_with(change):
    def apply(out: Path, prefix: str) -> None:
        path = out / f"{prefix}.flags.bin"
        flags = np.fromfile(path, dtype=np.uint8).reshape(-1, 128)
        change(flags)
        flags.tofile(path)

    return apply


def tokens_with(change):
    def apply(out: Path, prefix: str) -> None:
        path = out / f"{prefix}.bin"
        tokens = np.fromfile(path, dtype=np.uint16).reshape(-1, 128)
        change(tokens, np.fromfile(out / f"{prefix}.flags.bin", dtype=np.uint8).reshape(-1, 128))
        tokens.tofile(path)

    return apply


def set_at(row, column, value):
    def change(flags, *_):
        flags[row, column] = value(int(flags[row, column]))

    return change


def unpad(tokens, flags):
    tokens[(flags & PAD) != 0] = 7


def pad_in_the_middle(flags):
    flags[0, 40:44] = PAD


def swap_tokens(tokens, flags):
    tokens[:, [20, 21]] = tokens[:, [21, 20]]


SEMANTIC = [
    (flags_with(set_at(0, 0, lambda f: f | TARGET)), "first token of a document is a target"),
    (flags_with(set_at(0, 0, lambda f: f & ~8)), "does not begin with a document"),
    (flags_with(set_at(0, 5, lambda f: f | 0b110)), "not of a kind"),
    (flags_with(set_at(0, 5, lambda f: f | 0x80)), "has no meaning"),
    (flags_with(set_at(0, 5, lambda f: f & ~TARGET)), "targets"),
    (flags_with(set_at(-1, -1, lambda f: PAD | TARGET)), "padding is a target"),
    (flags_with(pad_in_the_middle), "padding is not only at the end"),
    (tokens_with(unpad), "not the padding token"),
    (tokens_with(set_at(0, 5, lambda t: 60_000)), "outside the vocabulary"),
    (tokens_with(swap_tokens), "its tokens are not those in the data"),
]


@pytest.mark.parametrize("damage, message", SEMANTIC, ids=[message for _, message in SEMANTIC])
def test_wrong_content_is_found_although_all_hashes_agree(result, damage, message):
    mix = load_mix(result)
    source = source_of(mix, "docs")
    damage(result, source["train"]["prefix"])
    reseal(result, lambda mix: source_of(mix, "docs")["train"])
    problems = verify(result, sample=200).problems
    assert any(message in problem for problem in problems), problems


def test_pairs_with_different_prompts_are_found(result):
    entry = source_of(load_mix(result), "pairs")["pairs"]["train"]
    opened = open_indexed(result / entry["prefix"])
    data = np.fromfile(result / f"{entry['prefix']}.bin", dtype=np.uint16)
    data[int(opened.pointers[1]) // 2] += 1
    data.tofile(result / f"{entry['prefix']}.bin")
    reseal(result, lambda mix: source_of(mix, "pairs")["pairs"]["train"])
    assert any("have different prompts" in problem for problem in verify(result, sample=0).problems)


def test_a_changed_source_is_found_by_tracing(result, corpus):
    text = corpus["instruction"].read_text()
    corpus["instruction"].write_text(text.replace("liver", "heart"))
    assert any("its tokens are not those" in problem for problem in verify(result, sample=600).problems)
    corpus["instruction"].unlink()
    findings = verify(result, sample=30)
    assert findings.problems == [] and any("not here" in note for note in findings.notes)


def test_records_that_lost_a_field_are_named(result, corpus):
    records = [json.loads(line) for line in corpus["instruction"].read_text().splitlines()]
    corpus["instruction"].write_text("".join(json.dumps(dict(list(record.items())[1:])) + "\n" for record in records))
    problems = verify(result, sample=60).problems
    assert problems and all(f"{corpus['instruction']}:" in problem for problem in problems)
    assert "is in the data, but cannot be read any more: missing key: no key" in problems[0]


def test_the_command_says_what_it_did_and_fails_with_code_3(result, capsys):
    args = argparse.Namespace(data=str(result), sample=3)
    assert verify_cli.run(args) == 0
    assert "8 prefixes" in capsys.readouterr().out
    next(result.glob("docs-train-*.bin")).unlink()
    with pytest.raises(VerificationError, match="is missing") as caught:
        verify_cli.run(args)
    assert caught.value.exit_code == 3
