"""The hand-over to the lm-evaluation-harness and the bundled tasks."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate import harness, measure
from megatron_mixcpt.evaluate.comparison import change, write_comparison
from megatron_mixcpt.evaluate.harness import (
    BUNDLED,
    TaskScore,
    _scores,
    bundled_tasks,
    check_tasks,
    data_files,
    resolve_task,
    run_harness,
)
from megatron_mixcpt.evaluate.held_out import SourcePerplexity
from tests.model.families import make, make_tokenizer

HARNESS = importlib.util.find_spec("lm_eval")


@pytest.mark.parametrize("task", bundled_tasks())
def test_bundled_tasks_are_well_formed(task):
    rows = [json.loads(line) for line in (BUNDLED / f"{task}.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert len({row["question"] + row["choices"][row["answer"]] for row in rows}) == 40
    answers = set()
    for row in rows:
        assert len(set(row["choices"])) == len(row["choices"]) >= 2
        assert 0 <= row["answer"] < len(row["choices"])
        answers.add(row["answer"])
    assert len(answers) > 1, "the right answer must not always stand at the same place"
    if task == "mixcpt_arithmetic":
        for row in rows:
            a, operation, b, _ = row["question"].split()
            result = {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[operation]
            assert row["choices"][row["answer"]] == str(result)


def test_tasks_resolve_to_definitions_with_absolute_files(tmp_path):
    definition = resolve_task("mixcpt_grammar")
    assert definition["dataset_kwargs"]["data_files"]["test"] == str(BUNDLED / "mixcpt_grammar.jsonl")
    assert resolve_task("hellaswag") == "hellaswag"
    (tmp_path / "q.jsonl").write_text("{}\n")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"task": "mine", "dataset_kwargs": {"data_files": {"test": "q.jsonl"}}}))
    assert resolve_task(str(path))["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "q.jsonl")


@pytest.mark.parametrize("content, message", [("a: [", "YAML"), ("x: !function f.y", "YAML"), ("- 1", "`task`")])
def test_files_that_are_no_task_are_refused(tmp_path, content, message):
    path = tmp_path / "task.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        resolve_task(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_task(str(tmp_path / "missing.yaml"))


@pytest.mark.skipif(HARNESS is not None, reason="the harness is installed")
def test_without_the_harness_the_extra_is_named():
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[eval\]'"):
        run_harness(Path("x"), ["mixcpt_grammar"], limit=1, dtype="fp32")


def test_a_missing_harness_is_told_before_any_model_is_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    make("llama-untied", tmp_path / "model", vocab_size=40)
    monkeypatch.setattr(measure, "measure_model", lambda *arguments: pytest.fail("it went on"))
    assert main(["eval", str(tmp_path / "model"), "--tasks", "bundled", "--out", str(tmp_path / "out")]) == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err


@pytest.mark.skipif(HARNESS is None, reason="pip install -e '.[eval]'")
def test_bundled_tasks_run_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make("llama-untied", tmp_path / "model", vocab_size=make_tokenizer(tmp_path / "model"))
    scores, items = run_harness(tmp_path / "model", bundled_tasks(), limit=4, dtype="fp32")
    assert {score.task for score in scores} == set(bundled_tasks())
    assert {score.metric for score in scores} == {"acc", "acc_norm"}
    assert all(0 <= score.value <= 1 and score.higher_is_better for score in scores)
    for score in scores:
        asked = [item for item in items if item.task == score.task]
        assert len(asked) == 4 and all(item.sure >= 0 and 0 < item.chance <= 0.5 for item in asked)
        assert all((item.answer == item.expected) == item.right for item in asked)
        if score.metric == "acc":
            assert score.value == sum(item.right for item in asked) / 4
    with pytest.raises(ConfigError, match="no_such_task"):
        run_harness(tmp_path / "model", ["no_such_task"], limit=1, dtype="fp32")


@pytest.mark.skipif(HARNESS is None, reason="pip install -e '.[eval]'")
def test_a_task_that_nobody_knows_is_told_before_any_model_is_opened(tmp_path, monkeypatch, capsys):
    make("llama-untied", tmp_path / "model", vocab_size=40)
    monkeypatch.setattr(measure, "measure_model", lambda *arguments: pytest.fail("it went on"))
    command = ["eval", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--tasks", "bundled", "hellaswagg"]
    assert main(command) == 2
    assert "the harness does not know hellaswagg; bundled: " in capsys.readouterr().err
    check_tasks(["bundled", "hellaswag", "mixcpt_grammar"])


def measured(domain, general, accuracy):
    return {
        "sources": [SourcePerplexity("facts", "domain", domain), SourcePerplexity("tasks", "instruction", general)],
        "tasks": [TaskScore("t", "acc", accuracy, None, True)],
    }


def test_a_source_that_improved_hides_no_other_that_was_lost():
    both = {"base": measured(20.0, 10.0, 0.5), "model": measured(10.0, 11.0, 0.4)}
    for parts, value in zip(both.values(), (30.0, 5.0), strict=True):
        parts["sources"].append(SourcePerplexity("pairs", "preference", value))
    assert change(both)["general_forgetting"] == pytest.approx(math.log(1.1))


def test_change_has_the_stated_signs(tmp_path):
    both = {"base": measured(20.0, 10.0, 0.5), "model": measured(10.0, 11.0, 0.4)}
    changes = change(both)
    assert changes["domain_gain"] == pytest.approx(0.6931, abs=1e-4)  # better: positive
    assert changes["general_forgetting"] == pytest.approx(0.0953, abs=1e-4)  # worse: positive
    assert changes["task_change"] == pytest.approx(-0.1)
    write_comparison(tmp_path, both, model="m", base="b")
    report = (tmp_path / "eval.md").read_text()
    assert "| facts | domain | 20 | 10 | -50.0% |" in report
    assert "| t | acc | 0.5 | 0.4 | -0.1000 |" in report
    assert json.loads((tmp_path / "eval.json").read_text())["change"] == pytest.approx(changes)


def test_without_a_base_figures_stand_alone(tmp_path):
    alone = {"model": measured(10.0, 11.0, 0.4)}
    assert change(alone) == {}
    write_comparison(tmp_path, alone, model="m", base=None, unmeasured=["few", "rare"])
    report = (tmp_path / "eval.md").read_text()
    assert "| facts | domain | 10 |" in report
    assert "Not measured: few, rare (no validation split with target tokens)." in report
    assert json.loads((tmp_path / "eval.json").read_text())["unmeasured"] == ["few", "rare"]


def test_data_files_have_every_form_that_datasets_takes(tmp_path):
    (tmp_path / "q.jsonl").write_text("{}\n")
    there, path = str(tmp_path / "q.jsonl"), tmp_path / "mine.yaml"
    for given, resolved in (
        ("q.jsonl", there),
        (["q.jsonl", "far.jsonl"], [there, "far.jsonl"]),
        ({"test": ["q.jsonl"], "train": "hub.jsonl"}, {"test": [there], "train": "hub.jsonl"}),
    ):
        path.write_text(yaml.safe_dump({"task": "mine", "dataset_kwargs": {"data_files": given}}))
        assert resolve_task(str(path))["dataset_kwargs"]["data_files"] == resolved
        assert data_files(str(path)) == [Path(there)]


def test_scores_of_several_filters_have_names_of_their_own():
    results = {"gsm8k": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.31}}
    scores = _scores({"results": results, "higher_is_better": {}})
    assert {score.metric: score.value for score in scores} == {
        "exact_match (strict-match)": 0.0,
        "exact_match (flexible-extract)": 0.31,
    }


def test_a_group_is_counted_by_its_members_alone():
    results = {"all": {"acc,none": 0.9}, "one": {"acc,none": 0.8}, "two": {"acc,none": 1.0}}
    output = {"results": results, "higher_is_better": {}, "group_subtasks": {"all": ["one", "two"], "one": []}}
    assert [score.task for score in _scores(output)] == ["one", "two"]
