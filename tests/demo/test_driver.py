"""The order of the demo and what depends on what, with commands that only leave traces."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.demo import __main__ as command_line
from megatron_mixcpt.demo import driver
from megatron_mixcpt.demo.settings import SMOLLM2, TINY
from megatron_mixcpt.errors import MixcptError

SMALL = {model.model: dataclasses.replace(model, num_people=1) for model in (SMOLLM2, TINY)}


class Commands:
    """Stands in for `mixcpt`, the base model and the judge; every model is a file that tells where it comes from."""

    def __init__(self):
        self.ran: list[str] = []
        self.fail_at: str | None = None

    def run_mixcpt(self, arguments, log, *, threads, poll=None):
        name, target = arguments[0], Path(arguments[1])
        self.ran.append(f"{name} {target.parent.name}")
        if self.ran[-1] == self.fail_at:
            raise MixcptError("broken on purpose")
        if name == "export":
            out = Path(arguments[3])
            out.mkdir(parents=True)
            (out / "origin").write_text((target / "origin").read_text())
            return
        config = yaml.safe_load(target.read_text())
        out = Path(config["out"] if name in ("preprocess", "select", "recall") else config["run_dir"])
        out.mkdir(parents=True, exist_ok=True)
        if name in ("train", "align"):
            base = config["model"].get("hf") or config["model"].get("checkpoint")
            origin = (Path(base) / "origin").read_text() if base else "tiny"
            what = config["align"]["method"] if name == "align" else f"{target.parent.name} {config['loss']['target']}"
            (out / "origin").write_text(f"{origin} > {what}")

    def save_smollm2(self, out):
        self.ran.append("unpack")
        out.mkdir()
        (out / "origin").write_text("smollm2")

    def measure(self, hf_dir, probe, on_progress):
        origin = (Path(hf_dir) / "origin").read_text()
        self.ran.append(f"measure {origin}")
        answers = [
            {"question": q, "expected": e, "answer": origin, "right": False}
            for q, e in zip(probe.questions, probe.expected)
        ]
        numbers = {"domain_ppl": 2.0, "general_ppl": 3.0, "fact_recall": 0.0, "fact_completion": 0.0}
        numbers["format_following"] = 0.5
        counts = {"domain_tokens": 1, "general_tokens": 1, "num_questions": len(answers)}
        return {**numbers, **counts, "answers": answers}


@pytest.fixture
def commands(monkeypatch):
    fake = Commands()
    monkeypatch.setattr(driver, "run_mixcpt", fake.run_mixcpt)
    monkeypatch.setattr(driver, "save_smollm2", fake.save_smollm2)
    monkeypatch.setattr("megatron_mixcpt.demo.probe.measure", fake.measure)
    monkeypatch.setattr(command_line, "MODELS", SMALL)
    terminate = signal.getsignal(signal.SIGTERM)
    yield fake
    signal.signal(signal.SIGTERM, terminate)


def origins(folder):
    report = json.loads((folder / "report.json").read_text())
    return {arm: values["answers"][0]["answer"] for arm, values in report.items()}


SMOLLM2_ORIGINS = {"base": "smollm2", "cpt": "smollm2 > cpt none", "mixcpt": "smollm2 > mixcpt swap"}
SMOLLM2_ORIGINS["aligned"] = f"{SMOLLM2_ORIGINS['mixcpt']} > sft > dpo"
TINY_BASE = "tiny > pretrain none"
TINY_ORIGINS = {"base": TINY_BASE, "cpt": f"{TINY_BASE} > cpt none", "mixcpt": f"{TINY_BASE} > mixcpt swap"}
TINY_ORIGINS["aligned"] = f"{TINY_ORIGINS['mixcpt']} > sft > dpo"
ALIGNED = [
    "select aligned",
    "align aligned",
    "align aligned",
    "export aligned",
    "measure smollm2 > mixcpt swap > sft > dpo",
]


def test_both_arms_start_from_the_base_and_the_base_is_measured_first(commands, tmp_path):
    driver.run_demo(SMALL["smollm2"], tmp_path)
    assert commands.ran == [
        "unpack", "measure smollm2",
        "preprocess cpt", "train cpt", "export cpt", "measure smollm2 > cpt none",
        "preprocess mixcpt", "train mixcpt", "export mixcpt", "measure smollm2 > mixcpt swap",
        *ALIGNED,
    ]  # fmt: skip
    assert origins(tmp_path) == SMOLLM2_ORIGINS


def test_the_arm_recall_writes_first_and_trains_on_what_was_written(commands, tmp_path, capsys):
    assert command_line.main(["--out", str(tmp_path / "demo"), "--arm", "recall"]) == 0
    assert commands.ran[10:15] == [
        "recall recall", "preprocess recall", "train recall", "export recall", "measure smollm2 > recall swap",
    ]  # fmt: skip
    arms = origins(tmp_path / "demo")
    assert list(arms) == ["base", "cpt", "mixcpt", "recall", "aligned"] and arms["recall"] == "smollm2 > recall swap"
    done = len(commands.ran)
    assert command_line.main(["--out", str(tmp_path / "demo")]) == 0  # nothing runs again for the arms without it
    assert len(commands.ran) == done and "recall" not in origins(tmp_path / "demo")
    assert command_line.main(["--out", str(tmp_path / "tiny"), "--model", "tiny", "--arm", "recall"]) == 2
    assert "--model smollm2" in capsys.readouterr().err and not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(("model", "with_recall"), [("smollm2", False), ("smollm2", True), ("tiny", False)])
def test_the_bar_counts_the_stages_that_are_run_and_no_others(commands, tmp_path, monkeypatch, model, with_recall):
    ended, expected = [], {}

    class Watched(driver.DemoConsole):
        def __init__(self, seconds):
            super().__init__(seconds)
            expected.update(seconds)

        def end(self):
            ended.append(self._stage)
            super().end()

    monkeypatch.setattr(driver, "DemoConsole", Watched)
    driver.run_demo(SMALL[model], tmp_path, with_recall=with_recall)
    assert sorted(ended) == sorted(expected)


def test_the_tiny_base_is_pretrained_by_the_same_commands(commands, tmp_path):
    driver.run_demo(SMALL["tiny"], tmp_path)
    assert commands.ran[:4] == ["preprocess pretrain", "train pretrain", "export pretrain", f"measure {TINY_BASE}"]
    assert origins(tmp_path) == TINY_ORIGINS


def test_another_model_in_the_same_folder_never_builds_on_the_first_ones_files(commands, tmp_path):
    for model, expected in [("smollm2", SMOLLM2_ORIGINS), ("tiny", TINY_ORIGINS), ("smollm2", SMOLLM2_ORIGINS)]:
        driver.run_demo(SMALL[model], tmp_path)
        assert origins(tmp_path) == expected


def test_a_failure_goes_on_where_it_stopped(commands, tmp_path, capsys):
    commands.fail_at = "train mixcpt"
    assert command_line.main(["--out", str(tmp_path / "demo")]) == 1
    assert "error: broken on purpose" in capsys.readouterr().err
    done = commands.ran.copy()
    commands.fail_at = None
    assert command_line.main(["--out", str(tmp_path / "demo")]) == 0
    assert commands.ran[len(done) :] == ["train mixcpt", "export mixcpt", "measure smollm2 > mixcpt swap", *ALIGNED]


def test_changed_settings_redo_the_training_but_not_the_base(commands, tmp_path):
    driver.run_demo(SMALL["smollm2"], tmp_path)
    before = len(commands.ran)
    driver.run_demo(dataclasses.replace(SMALL["smollm2"], lr=1e-5), tmp_path)
    steps = [step.split(" ")[0] for step in commands.ran[before:]]
    assert steps == ["train", "export", "measure"] * 2 + ["select", "align", "align", "export", "measure"]
    before = len(commands.ran)
    driver.run_demo(dataclasses.replace(SMALL["smollm2"], lr=1e-5, num_people=2), tmp_path)
    assert "unpack" not in commands.ran[before:] and "measure smollm2" in commands.ran[before:]


def test_fresh_starts_anew(commands, tmp_path):
    out = tmp_path / "demo"
    command_line.main(["--out", str(out)])
    first = commands.ran.copy()
    assert command_line.main(["--out", str(out), "--fresh"]) == 0
    assert commands.ran == first * 2


def test_an_interruption_says_how_to_go_on(commands, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "run_mixcpt", interrupt)
    assert command_line.main(["--out", str(tmp_path / "demo")]) == 130
    assert "run the same command to go on" in capsys.readouterr().err
