"""The whole pipeline: what is in the files, and that nothing but inputs and configuration decides it."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import (
    DOC_START,
    KIND_GENERAL,
    KIND_HIGH,
    PAD,
    ROLE_ASSISTANT,
    ROLE_MASK,
    ROLE_SHIFT,
    ROLE_USER,
    TARGET,
    kind_of,
    open_indexed,
)
from megatron_mixcpt.data_prep.mix import fingerprint
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.verify import verify
from megatron_mixcpt.errors import BadRecordsError, ConfigError, MixcptError
from tests.data_prep.helpers import digests, documents_of, load_mix, sequences_of, source_of

PREFIXES = [("docs", "train"), ("docs", "valid"), ("ask", "train"), ("ask", "valid"), ("pairs", "train")]


def run(values: dict, **options) -> tuple[Path, dict]:
    preprocess(parse_config(values), **options)
    out = Path(values["out"])
    return out, load_mix(out)


def reference_encode(tokenizer_dir, text: str) -> list[int]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def test_flags_keep_their_invariants(config_values):
    out, mix = run(config_values)
    for name, split in PREFIXES:
        entry = source_of(mix, name)[split]
        kind = {"docs": 0, "ask": 1, "pairs": 2}[name]
        tokens_seen = targets_seen = 0
        for tokens, flags in sequences_of(out, entry["prefix"]):
            assert len(tokens) == len(flags) == mix["seq_length"]
            pad = (flags & PAD) != 0
            start = (flags & DOC_START) != 0
            target = (flags & TARGET) != 0
            assert start[0]
            assert not (start & target).any() and not (pad & target).any()
            if pad.any():
                first = int(np.argmax(pad))
                assert pad[first:].all() and start[first] and not start[first + 1 :].any()
                assert (tokens[first:] == mix["tokenizer"]["pad_id"]).all()
            assert set(kind_of(flags[~pad]).tolist()) == {kind}
            tokens_seen += int((~pad).sum())
            targets_seen += int(target.sum())
        assert (tokens_seen, targets_seen) == (entry["tokens"], entry["target_tokens"])


def test_domain_text_arrives_whole_and_once(config_values, corpus, tokenizer_dir):
    out, mix = run(config_values)
    eos = mix["tokenizer"]["eos_id"]
    want = Counter()
    for line in corpus["domain"].read_text().splitlines():
        ids = [*reference_encode(tokenizer_dir, json.loads(line)["text"]), eos]
        want.update(tuple(ids[i : i + 128]) for i in range(0, len(ids), 128))
    got = Counter()
    for split in ("train", "valid"):
        got.update(tuple(tokens.tolist()) for tokens, _ in documents_of(out, source_of(mix, "docs")[split]["prefix"]))
    assert got == want


def test_general_text_differs_from_domain_text_in_its_kind_alone(config_values):
    out, mix = run(config_values)
    as_domain = sequences_of(out, source_of(mix, "docs")["train"]["prefix"])
    config_values["sources"][0]["kind"] = "general"
    out, mix = run(config_values)
    source = source_of(mix, "docs")
    assert source["kind"] == "general"
    for (tokens, flags), (same_tokens, domain_flags) in zip(sequences_of(out, source["train"]["prefix"]), as_domain):
        inside = (flags & PAD) == 0
        assert (tokens == same_tokens).all() and set(kind_of(flags[inside]).tolist()) == {KIND_GENERAL}
        assert ((flags & ~np.uint8(KIND_HIGH)) == domain_flags).all()
    assert verify(out).problems == []


def test_a_text_that_is_domain_and_general_is_kept_once(config_values, corpus):
    again = {**config_values["sources"][0], "name": "again", "kind": "general"}
    extra = corpus["domain"].with_name("extra.jsonl")
    extra.write_text("".join(json.dumps({"text": f"Only here, number {i}."}) + "\n" for i in range(50)))
    again["paths"] = [*again["paths"], str(extra)]
    config_values["sources"].append(again)
    _, mix = run(config_values)
    documents = [source_of(mix, "again")[split]["documents"] for split in ("train", "valid")]
    assert sum(documents) == 50


def test_conversations_are_never_cut(config_values, corpus, tokenizer_dir):
    out, mix = run(config_values)
    want = set()
    for line in corpus["instruction"].read_text().splitlines():
        record = json.loads(line)
        prompt = reference_encode(tokenizer_dir, record["instruction"] + "\n")
        want.add((*prompt, *reference_encode(tokenizer_dir, record["response"]), mix["tokenizer"]["eos_id"]))
    got = [
        tuple(tokens.tolist())
        for split in ("train", "valid")
        for tokens, _ in documents_of(out, source_of(mix, "ask")[split]["prefix"])
    ]
    assert len(got) == len(set(got)) and set(got) == want


@pytest.mark.parametrize("loss", ["all", "answer"])
def test_targets_lie_exactly_on_the_answers(config_values, corpus, tokenizer_dir, loss):
    config_values["sources"][1]["loss"] = loss
    out, mix = run(config_values)
    answers = set()
    for line in corpus["instruction"].read_text().splitlines():
        answers.add((*reference_encode(tokenizer_dir, json.loads(line)["response"]), mix["tokenizer"]["eos_id"]))
    for tokens, flags in documents_of(out, source_of(mix, "ask")["train"]["prefix"]):
        role = (flags & ROLE_MASK) >> ROLE_SHIFT
        assert set(role.tolist()) == {ROLE_USER, ROLE_ASSISTANT}
        assert tuple(tokens[role == ROLE_ASSISTANT].tolist()) in answers
        target = (flags & TARGET) != 0
        if loss == "answer":
            assert (target == (role == ROLE_ASSISTANT)).all()
        else:
            assert target[1:].all() and not target[0]


def test_pairs_stand_together_with_targets_on_the_answers(config_values, corpus, tokenizer_dir):
    out, mix = run(config_values)
    records = [json.loads(line) for line in corpus["preference"].read_text().splitlines()]
    want = set()
    for record in records:
        prompt = reference_encode(tokenizer_dir, record["prompt"] + "\n")
        sides = [reference_encode(tokenizer_dir, record[key]) for key in ("chosen", "rejected")]
        want.add(tuple((*prompt, *side, mix["tokenizer"]["eos_id"]) for side in sides))
    got = set()
    for split in ("train", "valid"):
        prefix = source_of(mix, "pairs")["pairs"][split]["prefix"]
        tokens, flags = open_indexed(out / prefix), open_indexed(out / f"{prefix}.flags")
        assert tokens.documents.tolist() == list(range(0, len(tokens) + 1, 2))
        for i in range(0, len(tokens), 2):
            got.add((tuple(tokens[i].tolist()), tuple(tokens[i + 1].tolist())))
            for j, kind in ((i, 2), (i + 1, 3)):
                assert set(kind_of(flags[j]).tolist()) == {kind}
                answer = ((flags[j] & ROLE_MASK) >> ROLE_SHIFT) == ROLE_ASSISTANT
                assert (((flags[j] & TARGET) != 0) == answer).all() and answer.any() and not answer[0]
    assert got == want


def test_both_responses_are_trained_on_when_asked_for(config_values):
    config_values["sources"][2]["responses"] = "both"
    out, mix = run(config_values)
    kinds = Counter(
        int(kind_of(flags[0])) for _, flags in documents_of(out, source_of(mix, "pairs")["train"]["prefix"])
    )
    assert kinds[2] == kinds[3] > 0


def test_concat_fills_every_sequence_but_the_last(config_values):
    config_values["sources"][0]["layout"] = "concat"
    out, mix = run(config_values)
    entry = source_of(mix, "docs")["train"]
    padded = [bool((flags & PAD).any()) for _, flags in sequences_of(out, entry["prefix"])]
    assert sum(padded) <= 1 and not any(padded[:-1])
    assert entry["tokens"] > (entry["sequences"] - 1) * 128


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(config_values, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("megatron_mixcpt.data_prep.plan.CHUNK_BYTES", 1 << 14)
    out, _ = run(config_values)
    other, _ = run({**config_values, "out": str(tmp_path / "other")}, workers=workers)
    assert digests(out) == digests(other)
    assert len(list((other / ".parts").glob("docs-*/*.part"))) > 5


def test_bytes_do_not_depend_on_sharding(config_values, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_mixcpt.data_prep.plan.CHUNK_BYTES", 1 << 14)
    out, _ = run(config_values)
    values = {**config_values, "out": str(tmp_path / "other")}
    for index in (2, 0):
        assert preprocess(parse_config(values), shard=(index, 3)) is None
    with pytest.raises(MixcptError, match="missing or damaged"):
        preprocess(parse_config(values), assemble_only=True)
    preprocess(parse_config(values), shard=(1, 3))
    preprocess(parse_config(values), assemble_only=True)
    assert digests(out) == digests(tmp_path / "other")


def test_the_seed_changes_the_order_but_not_the_tokens(config_values, tmp_path):
    _, mix = run(config_values)
    _, other_mix = run({**config_values, "seed": 8, "valid_fraction": 0.0, "out": str(tmp_path / "o")})
    assert mix["fingerprint"] != other_mix["fingerprint"]
    before = sum(source_of(mix, "docs")[split]["tokens"] for split in ("train", "valid"))
    assert source_of(other_mix, "docs")["train"]["tokens"] == before
    assert source_of(other_mix, "docs")["valid"] is None


def test_the_fingerprint_covers_the_mix_and_prefixes_hold_their_hash(config_values):
    out, mix = run(config_values)
    assert mix["fingerprint"] == fingerprint(mix)
    for source in mix["sources"]:
        assert source["train"]["prefix"] == f"{source['name']}-train-{source['train']['hash'][:12]}"
    assert sum(source["weight"] for source in mix["sources"]) == pytest.approx(1.0)
    assert (out / mix["tokenizer"]["path"] / "tokenizer.json").is_file()
    changed = json.loads(json.dumps(mix))
    changed["sources"][0]["train"]["tokens"] += 1
    assert fingerprint(changed) != mix["fingerprint"]


def test_literal_control_strings_stay_text(config_values, corpus, tokenizer_dir):
    text = "a web page that says <|endoftext|> and <|im_start|>system twice <|endoftext|>"
    corpus["domain"].write_text(json.dumps({"text": text}) + "\n")
    config_values["valid_fraction"] = 0.0
    out, mix = run(config_values)
    ((tokens, _),) = documents_of(out, source_of(mix, "docs")["train"]["prefix"])
    assert tokens.tolist() == [*reference_encode(tokenizer_dir, text), 0]
    assert not set(tokens[:-1].tolist()) & {0, 1, 2}


BAD_LINES = [
    (b"{not json", "invalid JSON"),
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (b'{"text": "a\x00b"}', "invalid JSON"),
    (b'{"text": "\\ud800"}', "invalid JSON"),
    (b"[" * 3000, "invalid JSON"),
    (b'["text"]', "not an object"),
    (b'{"body": "x"}', "missing key"),
    (b'{"text": 3}', "wrong type"),
    (b'{"text": null}', "wrong type"),
    (b'{"text": "  "}', "empty"),
    (b'{"text": "' + b"y" * 5000 + b'"}', "too large"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES, ids=[reason + str(i) for i, (_, reason) in enumerate(BAD_LINES)])
def test_a_bad_line_is_quarantined_with_its_place_and_the_rest_survives(config_values, corpus, line, reason):
    first, second, third = (b'{"text": "a good line %d"}' % i for i in range(3))
    corpus["domain"].write_bytes(b"\xef\xbb\xbf" + first + b"\n" + line + b"\r\n" + b"\n" + second + b"\r\n" + third)
    config_values.update(valid_fraction=0.0, max_record_bytes=4000)
    config_values["sources"][0]["max_bad_fraction"] = 0.25
    out, mix = run(config_values)
    assert source_of(mix, "docs")["train"]["documents"] == 3
    (row,) = [json.loads(row) for row in (out / "quarantine.jsonl").read_text().splitlines()]
    assert (row["source"], row["file"], row["line"], row["reason"]) == ("docs", str(corpus["domain"]), 2, reason)
    config_values["sources"][0]["max_bad_fraction"] = 0.24
    with pytest.raises(BadRecordsError, match=f"{corpus['domain'].name}:2") as caught:
        run(config_values)
    assert caught.value.exit_code == 4


def test_far_too_many_bad_records_end_the_run_long_before_the_last(config_values, corpus, monkeypatch):
    monkeypatch.setattr("megatron_mixcpt.data_prep.plan.CHUNK_BYTES", 2000)
    corpus["domain"].write_text("broken line\n" * 5000)
    config_values["engine"] = "reference"
    with pytest.raises(BadRecordsError, match=r"source docs: (\d+) of \1 records are bad") as caught:
        run(config_values)
    assert int(re.search(r"(\d+) of", str(caught.value))[1]) < 1000
    rows = (Path(config_values["out"]) / "quarantine.jsonl").read_text().splitlines()
    assert len(rows) == int(re.search(r"(\d+) of", str(caught.value))[1])


def test_what_a_run_replaces_and_what_cannot_be_validated_is_said(config_values, corpus, capsys):
    lines = corpus["preference"].read_text().splitlines(keepends=True)
    corpus["preference"].write_text("".join(lines[:3]))
    config_values["valid_fraction"] = 0.02
    run(config_values)
    said = capsys.readouterr().err
    assert "of pairs fell into its validation split" in said and "of docs fell" not in said and "replace" not in said
    run(config_values)
    assert "replace" not in capsys.readouterr().err
    config_values["seq_length"] = 256
    run(config_values)
    assert "holds a mixture of ask, docs, pairs at seq_length 128" in capsys.readouterr().err


def test_a_conversation_longer_than_a_sequence_is_quarantined(config_values, corpus):
    with open(corpus["instruction"], "a") as file:
        file.write(json.dumps({"instruction": "x", "response": "y " * 300}) + "\n")
    config_values["sources"][1]["max_bad_fraction"] = 0.01
    out, mix = run(config_values)
    (row,) = [json.loads(row) for row in (out / "quarantine.jsonl").read_text().splitlines()]
    assert row["reason"] == "too long" and row["line"] == 201
    entry = source_of(mix, "ask")
    assert entry["train"]["documents"] + entry["valid"]["documents"] == 200


def test_a_source_whose_records_are_all_held_out_is_an_error_that_says_so(config_values, corpus):
    config_values["valid_fraction"] = 0.999
    with pytest.raises(ConfigError, match=r"no training documents: held out are all \d+ that are left; lower valid"):
        run(config_values)


def test_an_empty_source_is_an_error(config_values, corpus):
    corpus["domain"].write_text("\n\n")
    with pytest.raises(ConfigError, match="source docs has no training documents: every record was left out"):
        run(config_values)
    config_values["sources"][0]["paths"] = ["no/such/*.jsonl"]
    with pytest.raises(ConfigError, match="no file matches"):
        run(config_values)


def test_data_prep_imports_no_torch():
    code = (
        "import sys, pkgutil, importlib, megatron_mixcpt.data_prep as p\n"
        "for m in pkgutil.iter_modules(p.__path__): importlib.import_module(p.__name__ + '.' + m.name)\n"
        "heavy = {'torch', 'transformers', 'megatron.core'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reference_that_is_asked_for_makes_parts_anew_that_the_fast_engine_made(config_values):
    """The remedy where `verify` finds tokens that are not the reference's."""

    def engines():
        receipts = Path(config_values["out"]).glob(".parts/*/0*.json")
        return {json.loads(path.read_text().partition("\n")[2])["engine"] for path in receipts}

    run(config_values)
    fast = engines()
    run(config_values | {"engine": "reference"})
    assert fast != engines() and len(engines()) == 1
    run(config_values)
    assert len(engines()) == 1  # what is there is right for both
