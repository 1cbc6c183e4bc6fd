"""`mixcpt eval`: mistakes are told before anything is measured, and what was measured is kept."""

import json

import pytest

from megatron_mixcpt.cli import main
from megatron_mixcpt.evaluate import measure
from megatron_mixcpt.evaluate.gci import GciScore, Instance, write_instances
from megatron_mixcpt.evaluate.harness import TaskScore
from megatron_mixcpt.evaluate.held_out import SourcePerplexity
from tests.helpers.corpus import write_mix


@pytest.fixture
def command(hf_dir, tmp_path):
    """An evaluation of one question into `tmp_path/out`."""
    questions = tmp_path / "gci.jsonl"
    write_instances(questions, [Instance("1", "speech", "Speak.", {"none": ["zebra"]}, {"none": ["zebra"]})])
    return ["eval", str(hf_dir), "--gci", str(questions), "--out", str(tmp_path / "out")]


@pytest.fixture
def measured(monkeypatch):
    """Names of the models that were measured, which takes no time; `broken` is one at which measuring fails."""
    names, broken = [], []

    def made_up(path, what, done=lambda parts: None):
        names.append(path.name)
        if path.name in broken:
            raise KeyboardInterrupt
        value = 2.0 + len(names)
        parts = {
            "sources": [SourcePerplexity("facts", "domain", 9 / value), SourcePerplexity("talk", "general", value)],
            "tasks": [],
            "gci": [],
        }
        done(parts)
        parts["tasks"] = [TaskScore("sums", "acc", 1 / value, None, True)]
        parts["gci"] = [
            GciScore(skill, score, 20, 0.5, 0.3, 0.7)
            for skill in ("all", "speech")
            for score in ("domain", "general", "both")
        ]
        done(parts)
        return parts

    monkeypatch.setattr(measure, "measure_model", made_up)
    return names, broken


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"base": "nowhere"}, "no such directory"),
        ({"base": "empty"}, "empty"),
        ({"out": "file"}, "file: cannot be written"),
        ({"out": "file/below"}, "below: cannot be written"),
        ({"mix": "too large"}, "they do not belong together"),
        ({"tasks": "none.yaml"}, "cannot be read"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(
    wrong, message, command, hf_dir, measured, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("megatron_mixcpt.evaluate.harness.find_spec", lambda name: True)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    values = {name: str(tmp_path / value) for name, value in wrong.items()}
    if "mix" in wrong:
        values["mix"] = str(write_mix(tmp_path / "data", seq_length=16, vocab_size=5000))
    options = [word for name, value in values.items() for word in (f"--{name}", value)]
    assert main([*command, "--base", str(hf_dir), *options]) in (1, 2)
    assert message in capsys.readouterr().err
    assert measured[0] == [] and not (tmp_path / "out").exists()


def test_results_are_written_as_they_come_and_a_whole_evaluation_stays(command, hf_dir, measured, tmp_path, capsys):
    names, broken = measured
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((hf_dir / "config.json").read_text())
    broken.append("base")
    found = tmp_path / "out" / "eval.json"
    assert main([*command, "--base", str(base)]) == 130
    content = json.loads(found.read_text())
    assert not content["complete"] and content["model"]["tasks"] and "sources" not in content["base"]
    assert "Not complete" in (found.parent / "eval.md").read_text()
    broken.clear()
    assert main([*command, "--base", str(base)]) == 0  # what was cut short is measured again
    content = json.loads(found.read_text())
    assert content["complete"] and content["base"]["sources"] and content["change"]["domain_gain"]
    names.clear()
    before = found.read_bytes()
    assert main([*command, "--base", str(base)]) == 2
    assert "is there already" in capsys.readouterr().err and names == [] and found.read_bytes() == before
    assert main([*command, "--base", str(base), "--overwrite"]) == 0


def test_an_average_that_was_stopped_goes_on_with_what_is_written(hf_dir, measured, tmp_path, capsys):
    names, broken = measured
    out = tmp_path / "out"
    words = ["average", "--base", str(hf_dir), "--tuned", str(hf_dir), "--alpha", "0.2", "0.5", "--out", str(out)]
    questions = tmp_path / "gci.jsonl"
    write_instances(questions, [Instance("1", "speech", "Speak.", {"none": ["zebra"]}, {"none": ["zebra"]})])
    words += ["--gci", str(questions)]
    broken.append("alpha-0.5")
    assert main(words) == 130 and names[-1] == "alpha-0.5"
    (out / "alpha-0.5").rename(tmp_path / "half")
    (out / "alpha-0.5").mkdir()  # as a stop amid writing leaves it
    written = (out / "alpha-0.2/model.safetensors").stat().st_mtime_ns
    broken.clear()
    assert main(words) == 0
    assert (out / "alpha-0.2/model.safetensors").stat().st_mtime_ns == written
    assert "tuned" in json.loads((out / "average.json").read_text())
    capsys.readouterr()
    assert main(words) == 2 and "average.json is there already" in capsys.readouterr().err


def test_average_refuses_what_stands_in_its_way_before_it_writes(hf_dir, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "alpha-0.5").mkdir(parents=True)
    (out / "alpha-0.5/config.json").touch()
    words = ["average", "--base", str(hf_dir), "--tuned", str(hf_dir), "--alpha", "0.2", "0.5", "--no-eval"]
    assert main([*words, "--out", str(out)]) == 2
    assert "alpha-0.5 is there already" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["alpha-0.5"]


def test_the_pages_of_eval_and_average_open_without_errors(command, hf_dir, measured, tmp_path):
    from tests.observe.browser import open_page

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((hf_dir / "config.json").read_text())
    assert main([*command, "--base", str(base)]) == 0
    words = ["average", "--base", str(hf_dir), "--tuned", str(hf_dir), "--alpha", "0.2", "0.6"]
    assert main([*words, *command[2:4], "--out", str(tmp_path / "averages")]) == 0
    for page, texts in (
        (tmp_path / "out" / "eval.html", ["learned", "Perplexity of held-out text", "both right", "Tasks"]),
        (tmp_path / "averages" / "average.html", ["The trade", "0.2", "Perplexity of held-out text"]),
    ):
        document, console = open_page(page, size=(400, 900))
        assert console == [] and document.count("<svg") >= 2
        assert all(text in document for text in texts)
        table = page.with_suffix(".md").read_text()
        assert "| facts | domain |" in table and "<" not in table.replace("<x", "")
