"""`mixcpt select`: scores are those of transformers on every process grid, and what comes out can be trained on."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from megatron_mixcpt.config import validate
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import open_indexed
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.tokenizer import load_tokenizer
from megatron_mixcpt.data_prep.verify import verify
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.select.candidates import prepare_candidates
from megatron_mixcpt.select.config import SelectConfig
from megatron_mixcpt.select.pick import pick, ranking, shares
from megatron_mixcpt.select.score import plan_rounds
from megatron_mixcpt.select.select import finish
from tests.align.runs import align_values, select_all, select_values
from tests.data_prep.helpers import documents_of
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed

LAYOUTS = {
    "one": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2xV2": (2, {"pipeline": 2, "interleave": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"context": 2}),
    "EP2": (2, {"expert": 2}),
}


def table_of(out):
    return {name: np.array(column) for name, column in pq.read_table(out / "scores.parquet").to_pydict().items()}


@pytest.fixture(scope="module")
def models(model_dir, experts_dir):
    """{layout: the model that it scores under}"""
    return {name: experts_dir if name.startswith("EP") else model_dir for name in LAYOUTS}


@pytest.fixture(scope="module")
def outs(tmp_path_factory, stage1, models) -> Path:
    """Folder of one selection a layout."""
    folder = tmp_path_factory.mktemp("select")
    for world_size in (1, 2):
        runs = [
            (free_port(), select_values(stage1, {"hf": str(models[name])}, folder / name, parallel))
            for name, (size, parallel) in LAYOUTS.items()
            if size == world_size
        ]
        run_distributed(select_all, world_size, runs, timeout=300)
    return folder


@pytest.fixture(scope="module")
def oracle(outs):
    """`{(source, line): (NLL of the answer, after the template, of the rejected answer)}` of a model."""
    return functools.cache(lambda model_dir: scores_of_transformers(model_dir, outs / "one"))


def scores_of_transformers(model_dir, out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    if hasattr(model, "set_experts_implementation"):  # transformers 5: one product an expert, which fp64 has
        model.set_experts_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def nll(prompt, answer):
        given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([given + said])).logits[0].log_softmax(-1)
        return -np.mean([logp[len(given) + i - 1, token].item() for i, token in enumerate(said)])

    found = {}
    for record in map(json.loads, (out / "candidates" / "records.jsonl").read_text().splitlines()):
        fields = record["record"]
        prompt = fields["instruction"] if record["kind"] == "instruction" else fields["prompt"]
        answer = fields["response"] if record["kind"] == "instruction" else fields["chosen"]
        asked = [{"role": "user", "content": prompt}]
        templated = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        rejected = nll(prompt + "\n", fields["rejected"]) if record["kind"] == "preference" else None
        found[record["source"], record["line"]] = (nll(prompt + "\n", answer), nll(templated, answer), rejected)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_transformers(outs, oracle, models, layout):
    table, expected = table_of(outs / layout), oracle(models[layout])
    assert len(table["source"]) == len(expected) > 80
    for row, key in enumerate(zip(table["source"], table["line"])):
        plain, chat, rejected = expected[key]
        assert table["nll_plain"][row] == pytest.approx(plain, abs=1e-5)
        assert table["nll_chat"][row] == pytest.approx(chat, abs=1e-5)
        assert table["fas"][row] == pytest.approx(chat / plain, rel=1e-5)
        assert table["ppl_plain"][row] == pytest.approx(np.exp(plain), rel=1e-4)
        if rejected is not None:
            assert table["nll_rejected"][row] == pytest.approx(rejected, abs=1e-5)
            assert table["margin"][row] == pytest.approx(rejected - plain, abs=2e-5)


@pytest.mark.distributed
def test_the_choice_is_balanced_without_repetition_and_from_the_low_end(outs):
    table = table_of(outs / "one")
    picked = table["picked"]
    assert {name: int((picked & (table["source"] == name)).sum()) for name in ("asked", "pairs", "more")} == {
        "asked": 20,
        "pairs": 6,
        "more": 6,
    }
    asked = table["source"] == "asked"
    assert table["ppl_plain"][picked & asked].max() <= np.sort(table["ppl_plain"][asked])[24]
    report = (outs / "one" / "report.md").read_text()
    assert "first chosen" in report and "worst" in report and "median FAS" in report
    assert "Distributions" in (outs / "one" / "report.html").read_text()


@pytest.mark.distributed
def test_what_is_chosen_is_ready_for_training(outs, stage1):
    """The mixtures verify; only answers with their end are learned; pairs are there for DPO."""
    out = outs / "one"
    assert verify(out / "sft", sample=50).problems == [] == verify(out / "dpo", sample=50).problems
    assert read_mix(out / "sft" / "mix.json").seq_length == read_mix(stage1 / "mix.json").seq_length
    tokenizer = load_tokenizer(out / "sft" / "tokenizer")
    answers = set()
    for source in json.loads((out / "sft" / "mix.json").read_text())["sources"]:
        for split in filter(None, (source["train"], source["valid"])):
            for tokens, flags in documents_of(out / "sft", split["prefix"]):
                answers.add(tokenizer.decode(tokens[(flags & 1) != 0].tolist()))
    records = [json.loads(line) for line in (out / "sft" / "records" / "asked.jsonl").read_text().splitlines()]
    assert len(records) == 20
    assert answers == {record["response"] + "<|im_end|>" for record in records}
    from megatron_mixcpt.config import Config
    from megatron_mixcpt.objectives.pairs import read_pair_mix

    mix = read_pair_mix(validate(Config, align_values(out / "dpo" / "mix.json"), "test"))
    assert {source.name for source in mix.sources} == {"pairs", "more"}
    # Every chosen record comes as often as every other, whatever its length.
    assert {source.share.requested["epochs"] for source in mix.sources} == {1.0}


@pytest.mark.distributed
def test_another_choice_takes_the_scores_that_are_there(tmp_path, outs, stage1, model_dir):
    """A damaged part is computed again, a whole one is not; another column chooses others."""
    out = tmp_path / "again"
    shutil.copytree(outs / "one", out)
    parts = sorted((out / "scores").glob("*.part"))
    assert len(parts) > 1
    damaged = bytearray(parts[0].read_bytes())
    damaged[-3] ^= 1
    parts[0].write_bytes(damaged)
    before = {part: part.stat().st_mtime_ns for part in parts}
    again = select_values(stage1, {"hf": str(model_dir)}, out, by="margin", order="high", n=0)
    run_distributed(select_all, 1, [(free_port(), again)])
    changed = [part for part in parts if part.stat().st_mtime_ns != before[part]]
    assert changed == [parts[0]] and parts[0].read_bytes() != bytes(damaged)
    first, second = table_of(outs / "one"), table_of(out)
    np.testing.assert_array_equal(first["nll_plain"], second["nll_plain"])
    assert second["picked"].sum() == 12 and (second["kind"][second["picked"]] == "preference").all()
    margins = second["margin"].astype(float)
    assert np.median(margins[second["picked"]]) > np.nanmedian(margins)


def config(stage1, tmp_path, **settings):
    return validate(SelectConfig, select_values(stage1, {"preset": "tiny"}, tmp_path / "out", **settings), "test")


def test_a_changed_source_file_is_refused(tmp_path, stage1):
    copy = tmp_path / "copy"
    shutil.copytree(stage1, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for entry in manifest["inputs"]:
        if entry["source"] == "pairs":
            entry["hash"] = "0" * 32
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=r"pairs\.jsonl has changed since source pairs"):
        prepare_candidates(config(copy, tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "fas", "format": "plain"}, "needs select.format chat"),
        ({"by": "margin"}, "only pairs have it, so set select.n=0"),
        ({"by": "perplexity"}, "'perplexity' is none of ppl_low, random, tokens"),
        ({"n": 0, "pairs": 0}, "nothing to choose"),
        ({"nn": 3}, "did you mean select.n"),
    ],
)
def test_wrong_settings_are_named(stage1, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        config(stage1, tmp_path, **settings)


def test_a_tokenizer_without_template_needs_the_plain_format(tmp_path, stage1):
    copy = tmp_path / "copy"
    shutil.copytree(stage1, copy)
    settings = copy / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}))
    with pytest.raises(ConfigError, match=r"set select\.format=plain"):
        prepare_candidates(config(copy, tmp_path))
    candidates = prepare_candidates(config(copy, tmp_path, format="plain"))
    assert {tuple(record["sequences"]) for record in candidates.records()} == {("plain",), ("plain", "rejected")}


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_a_pair_is_a_candidate_only_if_both_answers_fit_in_the_format(tmp_path, tokenizer_dir, form):
    """Rejected answers of which the last two fit without the template's turns, and not with them."""
    engine = load_tokenizer(tokenizer_dir).engine

    def length(*texts):
        return sum(len(engine.encode([text])[0]) for text in texts) + 1

    fits = max(n for n in range(60) if length("Why, 10?\n", "no. " * n) <= 64)
    pairs = [
        {"prompt": f"Why, {i}?", "chosen": "yes", "rejected": "no. " * (fits if i >= 28 else fits // 3)}
        for i in range(10, 30)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sides = {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}
    source = {"name": "pairs", "kind": "preference", "paths": [str(path)], **sides, "weight": 1, "format": "plain"}
    values = {"tokenizer": str(tokenizer_dir), "out": str(tmp_path / "data"), "seq_length": 64, "valid_fraction": 0}
    preprocess(parse_config({**values, "sources": [source]}))
    found = prepare_candidates(config(tmp_path / "data", tmp_path, format=form))
    assert found.num_records == (20 if form == "plain" else 18)
    chosen = [record["record"] for record in found.records()]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in chosen))
    values["out"] = str(tmp_path / "chosen")
    mix = read_mix(preprocess(parse_config({**values, "sources": [{**source, "format": form}]})))
    assert mix.sources[0].pairs[0].documents == found.num_records


@pytest.mark.parametrize(("n", "notes"), [(60, 1), (1000, 1), (5, 0)])
def test_where_all_are_taken_a_note_says_so(tmp_path, stage1, capsys, n, notes):
    few = config(stage1, tmp_path, n=n, pairs=1, by="tokens")
    candidates = prepare_candidates(few)
    capsys.readouterr()
    finish(few, candidates, -1.0 - np.arange(len(open_indexed(candidates.prefix))))
    out = capsys.readouterr().out
    records = sum(record["kind"] == "instruction" for record in candidates.records())
    assert out.count("note: ") == notes
    assert not notes or f"note: fewer instruction records than select.n={n}, all were taken: {records} " in out
    report = (tmp_path / "out" / "report.md").read_text()
    ends = report.split("Ends of the instruction records")[1].split("\n## ")[0]
    assert ("| worst |" in ends) == (not notes) and "first chosen" in ends


def test_rows_without_a_value_are_not_ranked():
    table = {"source": np.array(["a"] * 5), "margin": np.array([3.0, np.nan, 1.0, np.inf, 2.0])}
    assert ranking(table, "margin", "low", 0).tolist() == [2, 4, 0]
    assert ranking(table, "margin", "high", 0).tolist() == [0, 4, 2]
    assert sorted(ranking(table, "", "low", 0).tolist()) == [0, 1, 2, 3, 4]


def test_repeated_prompts_and_responses_are_taken_once():
    texts = [("a", "x"), ("A ", "y"), ("b", "X"), ("c", "z"), ("d", "w")]
    sources = np.array(["s", "s", "s", "s", "t"])
    assert pick(np.array([0, 1, 2, 3, 4]), sources, texts, 3).tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("available", "count", "expected"),
    [([5, 5], 4, [2, 2]), ([1, 9, 9], 9, [1, 4, 4]), ([2, 1], 9, [2, 1]), ([3, 3], 5, [3, 2]), ([], 3, [])],
)
def test_shares_are_even_and_none_is_lost(available, count, expected):
    assert shares(available, count) == expected


@pytest.mark.parametrize("data_size", [1, 3])
def test_rounds_hold_every_sequence_once_and_little_padding(data_size):
    lengths = np.random.default_rng(0).integers(1, 500, 700)
    rounds = plan_rounds(lengths, 1024, data_size)
    assert sorted(np.concatenate([work.sequences for work in rounds]).tolist()) == list(range(700))
    for work in rounds:
        assert lengths[work.sequences].max() <= work.length and work.rows * work.length <= 1024
    assert sum(len(work.sequences) * work.length for work in rounds) < 1.2 * lengths.sum()


def test_the_command_names_a_layout_that_does_not_fit(tmp_path, stage1):
    path = tmp_path / "select.yaml"
    path.write_text(json.dumps(select_values(stage1, {"preset": "tiny"}, tmp_path / "out", {"tensor": 2})))
    command = [sys.executable, "-m", "megatron_mixcpt.cli", "select", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "parallel.tensor=2" in result.stderr
