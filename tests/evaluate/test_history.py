"""The ledger on the pages of `mixcpt eval`, of one model and of a run: what was lost, learned, and when."""

import json

import pytest

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate import measure
from megatron_mixcpt.evaluate.comparison import write_comparison
from megatron_mixcpt.evaluate.gci import Answer
from megatron_mixcpt.evaluate.held_out import SourcePerplexity
from megatron_mixcpt.evaluate.history import measure_history
from megatron_mixcpt.evaluate.ledger import Item
from tests.observe.browser import open_page

NUMBER = 12


def parts_of(step):
    """Measurements after `step` steps: question n of the task is lost from step 10 n on, 0 and 1 come back at 30."""
    items = [
        Item(
            "sums",
            "even" if n % 2 else "odd",
            str(n),
            f"What is {n} & {n}?",
            str(2 * n),
            f"about {n} <b>",
            right,
            n / 2,
        )
        for n, right in ((n, step < 10 * n or n == 0 or (n == 1 and step == 30)) for n in range(NUMBER))
    ]
    talk = [Answer("a", "speech", "Speak.", "Yes.", step >= 20, True, -0.5)]
    sources = [SourcePerplexity("facts", "domain", 20 - step / 10), SourcePerplexity("prose", "general", 9 + step / 10)]
    return {"sources": sources, "tasks": [], "items": items, "gci": [], "gci_answers": talk}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with checkpoints of steps 10, 20, 30, the models that were measured, and the step that cannot be."""
    for step in (10, 20, 30):
        (tmp_path / "run" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    measured, broken = [], []

    def made_up(path, what):
        step = int(path.name.removeprefix("step_")) if path.name.startswith("step_") else 0
        if step in broken:
            raise KeyboardInterrupt
        measured.append(step)
        return parts_of(step)

    monkeypatch.setattr(measure, "measure_model", made_up)
    monkeypatch.setattr(measure, "check_models", lambda paths, settings: None)
    return tmp_path / "run", measured, broken


def test_a_history_goes_on_where_it_was_and_tells_since_when_an_answer_is_lost(run, tmp_path):
    folder, measured, broken = run
    base, out = tmp_path / "base", tmp_path / "out"
    broken.append(20)
    with pytest.raises(KeyboardInterrupt):
        measure_history(folder, base, measure.EvalSettings(), out)
    broken.clear()
    measure_history(folder, base, measure.EvalSettings(), out)
    assert measured == [0, 10, 20, 30]
    content = json.loads((out / "history.json").read_text())
    lost = {step: [e["num_lost"] for e in entries if e["group"] is None] for step, entries in content["ledger"].items()}
    assert lost == {"10": [1, 0, 0, 0], "20": [2, 0, 0, 0], "30": [2, 0, 0, 0]}
    text = (out / "history.md").read_text()
    assert "2 answers are wrong at the last checkpoint; 1 were wrong at an earlier one and came back." in text
    assert [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| What")] == ["20", "30"]
    with pytest.raises(ConfigError, match="another tasks: give another --out"):
        measure_history(folder, base, measure.EvalSettings(tasks=["bundled"]), out)
    (folder / "checkpoints" / "step_00000020" / "manifest.json").write_text("trained anew")
    measure_history(folder, base, measure.EvalSettings(), out)
    assert measured == [0, 10, 20, 30, 20]
    with pytest.raises(ConfigError, match="another run: give another --out"):
        measure_history(folder.rename(tmp_path / "other"), base, measure.EvalSettings(), out)
    with pytest.raises(ConfigError, match="no run with checkpoints"):
        measure_history(base, base, measure.EvalSettings(), out)


def test_the_page_of_one_model_lists_the_questions_that_were_lost_the_surest_first(tmp_path):
    both = {"base": parts_of(0), "model": parts_of(30)}
    write_comparison(tmp_path, both, model="m", base="b")
    content = json.loads((tmp_path / "eval.json").read_text())["ledger"]
    assert [(flip["id"], flip["lost"]) for flip in content["flips"] if flip["task"] == "sums"] == [
        ("3", True),
        ("2", True),
    ]
    assert [e["group"] for e in content["entries"] if e["task"] == "sums"] == [None, "odd", "even"]
    assert "| sums | all | 12 | 12 | 2 | 0 | 17 [0, 42] |" in (tmp_path / "eval.md").read_text()
    page = (tmp_path / "eval.html").read_text()
    assert page.index("What is 3 &amp; 3?") < page.index("What is 2 &amp; 2?") and "about 3 &lt;b&gt;" in page
    write_comparison(tmp_path, {"model": both["model"], "base": {"items": []}}, model="m", base="b", complete=False)
    assert json.loads((tmp_path / "eval.json").read_text())["ledger"] == {}  # what the base did not answer yet


def test_the_pages_open_without_errors_on_a_narrow_screen(run, tmp_path):
    measure_history(run[0], tmp_path / "base", measure.EvalSettings(), tmp_path)
    write_comparison(tmp_path, {"base": parts_of(0), "model": parts_of(30)}, model="m", base="b")
    for name, count in (("history", 3), ("eval", 2)):
        document, console = open_page(tmp_path / f"{name}.html", size=(400, 900))
        assert console == [] and document.count("<svg") >= count
