"""The whole demo with the tiny model: real commands, two ranks, a report whose facts hold; and running it again."""

import html
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.demo.report import verdict
from megatron_mixcpt.demo.settings import TINY

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]


def run_demo(out: Path) -> str:
    """The console output of `--model tiny`."""
    command = [sys.executable, "-m", "megatron_mixcpt.demo", "--model", "tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr  # no library gets a word in
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    return out, run_demo(out)


@pytest.fixture(scope="module")
def report(demo):
    return json.loads((demo[0] / "report.json").read_text())


def test_report_json_has_four_arms_with_finite_measurements(report):
    assert list(report) == ["base", "cpt", "mixcpt", "aligned"]
    for arm in report.values():
        assert math.isfinite(arm["domain_ppl"]) and math.isfinite(arm["general_ppl"])
        assert 0.0 <= arm["fact_recall"] <= 1.0
        assert arm["num_questions"] == 5 * TINY.num_people == len(arm["answers"])


def test_the_base_model_knows_general_text_and_no_facts(report):
    base = report["base"]
    assert base["general_ppl"] < 10.0  # about 1,000 for random weights
    assert base["domain_ppl"] > 100.0
    assert base["fact_recall"] == 0.0 and base["fact_completion"] == 0.0


def test_both_arms_learned_the_domain(report):
    for arm in ("cpt", "mixcpt"):
        assert report[arm]["domain_ppl"] < report["base"]["domain_ppl"] / 5
        assert report[arm]["fact_completion"] > report["base"]["fact_completion"]


def test_plain_cpt_forgets_and_mixcpt_forgets_less(report):
    assert report["cpt"]["general_ppl"] > 1.05 * report["base"]["general_ppl"]
    assert report["mixcpt"]["general_ppl"] < report["cpt"]["general_ppl"]


def test_alignment_keeps_general_text_and_chooses_what_it_was_told(demo, report):
    assert report["aligned"]["general_ppl"] < 1.25 * report["mixcpt"]["general_ppl"]
    assert report["aligned"]["format_following"] >= report["mixcpt"]["format_following"]
    aligned = demo[0] / "aligned"
    picks = {name: (aligned / f"selected/{name}").glob("records/*.jsonl") for name in ("sft", "dpo")}
    counts = {name: sum(len(path.read_text().splitlines()) for path in paths) for name, paths in picks.items()}
    assert counts == {"sft": TINY.select_instructions, "dpo": TINY.select_pairs}
    rows = [json.loads(line) for line in (aligned / "dpo/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[0] == pytest.approx(math.log(2.0), abs=1e-6) and losses[-1] < losses[0]


def test_report_md_and_console_say_what_report_json_says(demo, report):
    out, console = demo
    text = (out / "report.md").read_text()
    assert verdict(report) in text and verdict(report) in console
    assert f"{report['mixcpt']['general_ppl']:.2f}" in text
    assert html.escape(verdict(report)) in (out / "report.html").read_text()


def test_the_arms_ran_as_configured_on_two_ranks(demo):
    out, _ = demo
    for arm in ("pretrain", "cpt", "mixcpt"):
        ran = yaml.safe_load((out / arm / "run/config.yaml").read_text())
        assert ran["parallel"]["tensor"] == 2
        assert ran["loss"]["target"] == ("swap" if arm == "mixcpt" else "none")
        rows = [json.loads(line) for line in (out / arm / "run/metrics.jsonl").read_text().splitlines()]
        steps = TINY.pretrain_steps if arm == "pretrain" else TINY.steps
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, steps + 1))


def test_running_it_again_skips_every_stage_and_reports_the_same(demo, report):
    out, first = demo
    logs = {path: path.read_bytes() for path in (out / "logs").iterdir()}
    again = run_demo(out)
    assert again.count("done before, skipped") == len(TINY.expected_seconds) and "..." not in again
    assert json.loads((out / "report.json").read_text()) == report
    assert {path: path.read_bytes() for path in (out / "logs").iterdir()} == logs
    assert first.count("done in") == len(TINY.expected_seconds)
