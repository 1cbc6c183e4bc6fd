"""Filters: what they drop, what they keep, and that everything dropped is accounted for."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_mixcpt.data_prep.config import NearDuplicates, parse_config
from megatron_mixcpt.data_prep.neardup import Signer, choose_bands, near_duplicates
from megatron_mixcpt.data_prep.ngrams import NgramHasher
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.errors import ConfigError
from tests.data_prep.conftest import sentences, write_jsonl
from tests.data_prep.helpers import load_mix, source_of


def statuses(values: dict) -> dict[str, list[str]]:
    """Run; the status of every record by source."""
    preprocess(parse_config(values))
    out = Path(values["out"])
    found = {}
    for source in values["sources"]:
        rows = pq.read_table(out / "provenance" / f"{source['name']}.parquet").to_pylist()
        found[source["name"]] = [row["status"] for row in rows]
        entry = source_of(load_mix(out), source["name"])
        kept = sum(row["status"] == "kept" and row["kind"] != "preference-rejected" for row in rows)
        assert kept == sum(entry[split]["documents"] for split in ("train", "valid") if entry[split])
    return found


@pytest.fixture
def one_source(config_values):
    config_values["sources"] = config_values["sources"][:1]
    config_values["valid_fraction"] = 0.0
    return config_values


def test_exact_duplicates_are_dropped_over_all_sources_and_the_first_stays(config_values, tmp_path):
    texts = sentences(6, seed=9)
    config_values["valid_fraction"] = 0.0
    first = write_jsonl(tmp_path / "1.jsonl", [{"text": text} for text in [*texts[:3], texts[0]]])
    second = write_jsonl(tmp_path / "2.jsonl", [{"text": text} for text in [texts[1], *texts[3:]]])
    base = config_values["sources"][0]
    config_values["sources"] = [
        {**base, "name": "a", "paths": [str(first)]},
        {**base, "name": "b", "paths": [str(second)]},
    ]
    assert statuses(config_values) == {"a": ["kept"] * 3 + ["duplicate"], "b": ["duplicate"] + ["kept"] * 3}
    config_values["exact_duplicates"] = "keep"
    assert {status for found in statuses(config_values).values() for status in found} == {"kept"}


def test_what_is_held_out_is_not_trained_on_also_where_duplicates_are_kept(one_source, tmp_path):
    texts = sentences(4, seed=9)
    docs = one_source["sources"][0]
    docs["paths"] = [str(write_jsonl(tmp_path / "1.jsonl", [{"text": text} for text in [*texts, texts[0], texts[1]]]))]
    docs["heldout"] = [str(write_jsonl(tmp_path / "2.jsonl", [{"text": texts[1]}, {"text": texts[1]}]))]
    one_source["exact_duplicates"] = "keep"
    found = statuses(one_source)["docs"]
    # Both in the training file go, and both that are held out stay.
    assert found == ["kept", "duplicate", "kept", "kept", "kept", "duplicate", "kept", "kept"]


def test_a_pair_and_an_instruction_are_not_duplicates_of_a_text(config_values, tmp_path):
    (text,) = sentences(1)
    config_values["valid_fraction"] = 0.0
    docs, ask, pairs = config_values["sources"]
    docs["paths"] = [str(write_jsonl(tmp_path / "1.jsonl", [{"text": text}]))]
    ask["paths"] = [str(write_jsonl(tmp_path / "2.jsonl", [{"instruction": text, "response": text}]))]
    pairs["paths"] = [str(write_jsonl(tmp_path / "3.jsonl", [{"prompt": text, "chosen": text, "rejected": "no"}] * 2))]
    assert statuses(config_values) == {"docs": ["kept"], "ask": ["kept"], "pairs": ["kept"] * 2 + ["duplicate"] * 2}


def test_length_limits_count_tokens(one_source, tmp_path):
    texts = ["a b", "a b c d e f g h", " ".join("abcdefgh" * 10)]
    one_source["sources"][0]["paths"] = [str(write_jsonl(tmp_path / "1.jsonl", [{"text": text} for text in texts]))]
    one_source["sources"][0].update(min_tokens=5, max_tokens=40)
    assert statuses(one_source) == {"docs": ["too short", "kept", "too long"]}


def test_near_duplicates_are_dropped_and_different_texts_stay(one_source, tmp_path):
    rng = random.Random(3)
    vocabulary = [f"word{i}" for i in range(3000)]
    originals = [rng.choices(vocabulary, k=200) for _ in range(40)]
    records, want = [], []
    for words in originals:
        records.append(words)
        want.append("kept")
        if rng.random() < 0.5:
            changed = list(words)
            changed[rng.randrange(200)] = "changed"  # 5 of about 200 shingles differ: Jaccard about 0.95
            records.append(changed)
            want.append("near-duplicate")
    texts = [" ".join(words).upper() + "!" for words in records]
    one_source["sources"][0]["paths"] = [str(write_jsonl(tmp_path / "1.jsonl", [{"text": text} for text in texts]))]
    one_source["near_duplicates"] = {"threshold": 0.8}
    assert statuses(one_source)["docs"] == want


def test_signatures_estimate_the_jaccard_similarity():
    rng = random.Random(1)
    hasher = NgramHasher(3)
    signer = Signer(NearDuplicates(ngram=3, permutations=1024))
    for keep in (0.2, 0.6, 0.9):
        words = [f"w{rng.randrange(10**6)}" for _ in range(400)]
        other = [*words[: int(400 * keep)], *(f"v{rng.randrange(10**6)}" for _ in range(400 - int(400 * keep)))]
        a, b = (set(hasher.hashes(" ".join(each)).tolist()) for each in (words, other))
        first, second = signer.signatures([" ".join(words), " ".join(other)])
        exact = len(a & b) / len(a | b)
        # Standard deviation of the estimate: sqrt(J (1 - J) / 1024) <= 0.016.
        assert abs((first == second).mean() - exact) < 5 * 0.016


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_banding_finds_what_comparing_all_pairs_finds(threshold):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**32, size=(60, 128), dtype=np.uint32)
    rows = [base]
    for share in (0.3, 0.9, 0.99):
        copy = base[:20].copy()
        change = rng.random(copy.shape) > share
        copy[change] = rng.integers(0, 2**32, size=int(change.sum()), dtype=np.uint32)
        rows.append(copy)
    signatures = np.concatenate(rows)
    alike = (signatures[:, None] == signatures[None]).mean(axis=2) >= threshold
    # The rest of each connected group, except its first member.
    want = np.zeros(len(signatures), dtype=bool)
    for i in range(len(signatures)):
        group, todo = {i}, [i]
        while todo:
            for j in np.flatnonzero(alike[todo.pop()]).tolist():
                if j not in group:
                    group.add(j)
                    todo.append(j)
        want[i] = min(group) != i
    halves = [signatures[:50], signatures[50:]]
    got = near_duplicates(halves, [np.arange(50), np.arange(len(signatures) - 50)], threshold)
    # Nothing that is not alike is dropped; a pair at the very threshold may be missed.
    assert not (got & ~want).any() and (got & want).sum() >= 0.9 * want.sum()


@pytest.mark.parametrize("permutations, threshold", [(128, 0.8), (64, 0.5), (256, 0.9), (16, 0.99)])
def test_bands_rarely_miss_a_pair_at_the_threshold(permutations, threshold):
    bands, rows = choose_bands(permutations, threshold)
    assert bands * rows <= permutations
    assert 1 - (1 - threshold**rows) ** bands >= 0.95 or rows == 1


def test_ngram_hashes_equal_exactly_when_the_words_do():
    hasher = NgramHasher(3)
    a = hasher.hashes("The quick, brown fox; jumps")
    b = hasher.hashes("the QUICK brown fox leaps")
    assert (a[:2] == b[:2]).all() and a[2] != b[2] and len(a) == 3
    assert len(NgramHasher(6).hashes("only five words are here")) == 0
    assert len(set(hasher.hashes("a b c a c b b a c").tolist())) == 7


@pytest.mark.parametrize("action", ["drop", "flag"])
def test_evaluation_text_is_found_inside_a_document(one_source, tmp_path, action):
    texts = sentences(20, seed=11, words=(30, 40))
    question = "How many widgets does the seventh engineer of Qarth count before the bell rings at noon?"
    texts[7] = texts[7] + " " + question.upper().replace(" ", "\n") + " " + texts[8]
    one_source["sources"][0]["paths"] = [str(write_jsonl(tmp_path / "1.jsonl", [{"text": text} for text in texts]))]
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"id": 1, "data": {"questions": [question, "short one"]}}])
    one_source["decontaminate"] = {"paths": [str(held_out)], "ngram": 8, "action": action}
    found = statuses(one_source)["docs"]
    assert [i for i, status in enumerate(found) if status == "contaminated"] == ([7] if action == "drop" else [])
    rows = pq.read_table(Path(one_source["out"]) / "provenance" / "docs.parquet").to_pylist()
    assert [i for i, row in enumerate(rows) if row["contaminated"]] == [7]


def test_evaluation_files_without_text_are_refused(one_source, tmp_path):
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"q": "too short"}])
    one_source["decontaminate"] = {"paths": [str(held_out)]}
    with pytest.raises(ConfigError, match="has 13 words; lower ngram"):
        preprocess(parse_config(one_source))


def test_other_evaluation_files_lead_to_other_flags(one_source, tmp_path):
    texts = sentences(5, seed=2, words=(20, 30))
    one_source["sources"][0]["paths"] = [str(write_jsonl(tmp_path / "1.jsonl", [{"text": text} for text in texts]))]
    held_out = tmp_path / "eval.jsonl"
    one_source["decontaminate"] = {"paths": [str(held_out)], "ngram": 6}
    for index in (1, 3):
        held_out.write_text(json.dumps({"q": texts[index]}))
        assert statuses(one_source)["docs"].index("contaminated") == index


def test_provenance_leads_to_the_tokens(config_values):
    from megatron_mixcpt.data_prep.format import open_indexed

    preprocess(parse_config(config_values))
    out = Path(config_values["out"])
    mix = load_mix(out)
    for source in mix["sources"]:
        rows = pq.read_table(out / "provenance" / f"{source['name']}.parquet").to_pylist()
        opened = {split: open_indexed(out / source[split]["prefix"]) for split in ("train", "valid")}
        total = dict.fromkeys(opened, 0)
        for row in rows:
            left = row["tokens"]
            for sequence, position in zip(row["sequences"], row["positions"]):
                size = min(left, mix["seq_length"])
                tokens = opened[row["split"]][sequence][position : position + size]
                left -= size
                total[row["split"]] += size
            if row["sequences"]:
                assert left == 0 and tokens[-1] == mix["tokenizer"]["eos_id"]
        assert total == {split: source[split]["tokens"] for split in total}
