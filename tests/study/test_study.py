"""A study goes on after every stop, computes nothing twice, and says what failed and what differs."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.study.kept import ARCHIVE, keep, put_back
from megatron_mixcpt.cli import main
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.files import write_json
from megatron_mixcpt.study import cells as cells_module
from megatron_mixcpt.study import run
from megatron_mixcpt.study.plan import foretold
from megatron_mixcpt.study.report import write_report
from megatron_mixcpt.study.run import run_study
from megatron_mixcpt.study.status import standing
from tests.helpers.corpus import write_mix
from tests.observe.browser import open_page
from tests.study.pretended import made_up, read


def test_a_process_that_was_killed_is_told_as_that(write_study, tmp_path):
    """Not by the last that it said, which was all right."""
    program = "import os, signal; print('step 9', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    team = run._Team(read(write_study()), 1)
    code, reason = team._process([sys.executable, "-c", program], tmp_path / "log.txt", dict(os.environ))
    assert code == -signal.SIGKILL and "killed by SIGKILL, as the kernel does where memory runs out" in reason


def test_all_rates_with_one_seed_and_then_all_seeds_at_the_chosen_rate(write_study, pretend):
    cells = read(write_study(choose={"within": {"forgetting": 0.05}}))
    pretended = pretend(cells)
    now = run_study(cells, 1)
    # At 1e-2 a run forgets 0.2 nats: the rule must take 1e-3.
    assert now.chosen == {"ce": (1e-3, 1.0, True), "mixcpt": (1e-3, 1.0, True)}
    assert sorted((cell.arm, cell.lr, cell.seed) for cell in now.runs) == [
        (arm, *rest) for arm in ("ce", "mixcpt") for rest in ((1e-3, 1), (1e-3, 2), (1e-2, 1))
    ]
    assert len(pretended.trained) == len(set(pretended.trained)) == 6 == cells.num_runs
    content = json.loads((cells.out / "study.json").read_text())
    assert content["complete"] and content["arms"]["ce"]["lr"] == 1e-3
    gained = content["arms"]["ce"]["over_seeds"]["domain"]
    assert gained["mean"] == pytest.approx(0.115) and gained["half_width"] == pytest.approx(12.706 * 0.005, rel=1e-3)
    of_run = content["runs"][0]["by_alpha"]
    assert of_run["0.5"]["forgetting"] == pytest.approx(of_run["1"]["forgetting"] / 2)
    assert of_run["1"]["ledger"][0]["count"] == 6


def test_a_question_that_flips_is_counted_once_whatever_of_it_is_judged(write_study, pretend):
    cells = read(write_study())
    pretend(cells)
    run_study(cells, 1)
    rows = [line.split(" | ") for line in (cells.out / "study.md").read_text().splitlines() if " / " in line]
    # Three of six were right before, and all are after the learning rate of 1e-2; each has a fact, a skill and both.
    assert {row[-5] for row in rows if row[1:4] == ["0.01", "1", "1"]} == {"0 / 3"}, rows


def test_where_averages_are_to_choose_from_the_means_over_seeds_are_theirs(write_study, pretend):
    """At 1e-2 the run forgets 0.2 nats and its half 0.1; the run at 1e-3 gains less than that half."""
    cells = read(write_study(choose={"within": {"forgetting": 0.1}}))
    pretend(cells)
    now = run_study(cells, 1)
    assert now.chosen["ce"] == (1e-2, 0.5, True)
    content = json.loads((cells.out / "study.json").read_text())
    assert content["arms"]["ce"]["alpha"] == 0.5
    assert content["arms"]["ce"]["over_seeds"]["domain"]["mean"] == pytest.approx(0.5 * (1 + 0.015))
    assert "| ce | 0.01 | 0.5 | 2 |" in (cells.out / "study.md").read_text()


def test_arms_are_compared_seed_by_seed_with_the_best(write_study, pretend):
    """What a seed does to both arms falls out of their difference."""
    arms = {"ce": {"loss.target": "none"}, "mixcpt": {"lr": [2e-3, 4e-3]}}
    cells = read(write_study(arms=arms, choose={"within": {"forgetting": 0.1}, "averages": False}))
    pretend(cells)
    run_study(cells, 1)
    content = json.loads((cells.out / "study.json").read_text())
    assert content["best"] == "mixcpt" and list(content["from_best"]) == ["ce"]
    gained = content["from_best"]["ce"]["domain"]
    assert gained["mean"] == pytest.approx(100 * (1e-3 - 4e-3)) and gained["seeds"] == 2
    assert gained["half_width"] == pytest.approx(0.0, abs=1e-9)
    assert content["arms"]["ce"]["over_seeds"]["domain"]["half_width"] > 0.05
    page = (cells.out / "study.md").read_text()
    assert "## Difference from mixcpt, seed by seed" in page and "| ce | 2 | -0.300 ± 0.000 |" in page


def test_the_same_command_again_makes_nothing_and_a_changed_setting_what_depends_on_it(
    write_study, pretend, material, monkeypatch
):
    cells = read(write_study())
    first = pretend(cells)
    run_study(cells, 1)
    again = pretend(cells)
    run_study(cells, 1)
    assert again.trained == again.measured == []

    changed = read(write_study(arms={"ce": {"loss.target": "none"}, "mixcpt": {"loss.kd_weight": 2.0}}))
    other = pretend(changed)
    run_study(changed, 1)
    assert len(other.trained) == 3 and all("mixcpt" in name for name in other.trained)
    assert set(other.trained).isdisjoint(first.trained)

    more = read(write_study(average=[0.5, 0.75]))
    averaged = pretend(more)
    run_study(more, 1)  # measures anew what lacks an average; the trainer would say at once that its run is at its end
    assert len(averaged.measured) == 6 and "0.75" in more.measured(more.sweep("ce")[0])

    monkeypatch.setattr(cells_module, "_fingerprint", cells_module.weights_fingerprint)
    with open(material / "hf" / "config.json", "a") as file:
        file.write("\n")  # another model under the same name
    assert not {cell.folder for cell in read(write_study()).sweep("ce")} & {cell.folder for cell in cells.sweep("ce")}

    otherwise = read(write_study(measure={"max_samples": 3}))
    assert otherwise.base_file != cells.base_file and otherwise.missing(otherwise.sweep("ce")[0]) == [1.0, 0.5]


def test_a_later_version_leaves_a_run_what_it_was_and_says_where_a_default_is_another(write_study, pretend):
    cells = read(write_study())
    pretend(cells)
    run_study(cells, 1)
    cell = cells.sweep("ce")[0]

    class Later(type(cell.config.train)):
        of_a_later_version: str = "off"

    for value, is_same in (("off", True), ("on", False)):
        train = Later(**cell.config.train.model_dump(), of_a_later_version=value)
        later = cell.config.model_copy(update={"train": train})
        assert (cells_module._own(later) == cells_module._own(cell.config)) == is_same

    text = (cell.folder / "train.yaml").read_text()
    assert "weight_decay: 0.1" in text
    (cell.folder / "train.yaml").write_text(text.replace("weight_decay: 0.1", "weight_decay: 0.2"))
    with pytest.raises(ConfigError, match=r"train\.weight_decay was 0\.2, which was the default, and now is 0\.1"):
        read(write_study()).sweep("ce")


def test_finished_runs_are_kept_without_weights_and_put_back(write_study, pretend, tmp_path):
    path = write_study()
    cells = read(path)
    pretend(cells, failing=["ce-lr0.01"])
    run_study(cells, 1)
    kept = tmp_path / "kept"
    finished = [cell for cell in standing(cells).runs if not cells.missing(cell)]
    assert keep(Path(path), kept) == len(finished) > 0
    first = (kept / ARCHIVE).read_bytes()
    measured = {cell.folder: cells.measured(cell) for cell in finished}
    shutil.rmtree(cells.out)
    assert put_back(kept, cells.out) > 0 and put_back(kept, cells.out) == 0
    again = read(path)
    assert {folder: again.measured(again.named(folder.name)) for folder in measured} == measured
    assert again.base_measured == cells.base_measured
    rest = pretend(again)
    run_study(again, 1)
    assert set(rest.trained).isdisjoint(str(folder / "run") for folder in measured) and rest.trained
    assert put_back(tmp_path / "nothing", tmp_path) == 0
    run_study(again, 1)
    keep(Path(path), kept)
    grown = (kept / ARCHIVE).read_bytes()
    keep(Path(path), kept)
    assert (kept / ARCHIVE).read_bytes() == grown != first


def test_a_run_that_fails_stands_in_the_table_with_its_reason_and_is_tried_again(write_study, pretend, capsys):
    cells = read(write_study())
    pretend(cells, failing=["ce-lr0.01"])
    now = run_study(cells, 2)
    assert list(now.failed.values()) == ["the data is damaged"]
    assert now.chosen["ce"] == (1e-3, 1.0, True)  # of what there is
    text = (cells.out / "study.md").read_text()
    assert "failed: the data is damaged" in text and len(now.runs) == 6
    assert not json.loads((cells.out / "study.json").read_text())["complete"]
    mended = pretend(cells)
    now = run_study(cells, 2)
    assert not now.failed and now.chosen["ce"].lr == 1e-2
    assert sorted(Path(name).parent.name.partition("-seed")[0] for name in mended.trained) == ["ce-lr0.01", "ce-lr0.01"]


def test_workers_share_a_study_and_none_makes_what_another_has(write_study, pretend):
    """Several at a time here, and a second team that came later, as on another node."""
    path = write_study()
    cells = read(path)
    pretended = pretend(cells, seconds=0.2)
    other = threading.Thread(target=lambda: run._Team(read(path), 2).work())
    other.start()
    run._Team(cells, 2).work()
    other.join(60)
    assert len(pretended.trained) == len(set(pretended.trained)) == 6
    assert pretended.most > 1


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"arms": {"ce": {"loss.targt": "none"}}}, r"arms\.ce: .*loss\.targt: unknown key; did you mean loss\.target"),
        ({"lr": ["x"]}, "lr"),
        ({"arms": {"ce": {"lr": []}}}, r"arms\.ce\.lr: a list of learning rates"),
        ({"arms": {"ce": {"lr": [1e-3, 1e-3]}}}, r"arms\.ce\.lr: a learning rate is given twice"),
        ({"arms": {"a b": {}}}, "arms"),
        ({"arms": {"ce": {"train.lr": 1e-3}}}, r"arms\.ce: train\.lr is the study's: give the arm its own .* `lr:"),
        ({"arms": {"ce": {"train": {"seed": 4}}}}, r"arms\.ce: train\.seed is the study's: see seeds"),
        ({"arms": {"ce": {"run_dir": "elsewhere"}}}, r"arms\.ce: run_dir is the study's: see out"),
        ({"seeds": [1, 1]}, "seeds: a seed is given twice"),
        ({"choose": {"gain": "facts"}}, r"choose\.gain facts .* measure\.gci"),
        ({"choose": {"within": {"tasks": 0.1}}}, r"choose\.within\.tasks needs measure\.tasks"),
        ({"arms": {"ce": {}, "other": {"model": {"hf": "elsewhere"}}}}, r"arms\.other: model: all arms start from"),
        ({"arms": {"ce": {"data.mix": "nowhere/mix.json"}}}, r"arms\.ce: data\.mix: nowhere/mix\.json: no such file"),
        ({"arms": {"ce": {"model": {"hf": None, "preset": "tiny"}}}}, r"arms\.ce: model: all arms start from"),
        ({"average": [1.0]}, r"average"),
    ],
)
def test_what_is_wrong_is_told_by_arm_and_key_before_anything_starts(write_study, tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message):
        read(write_study(**changed))
    assert not (tmp_path / "out").exists()


def test_a_study_needs_a_model_to_compare_with(write_study, material, tmp_path):
    random = tmp_path / "random.yaml"
    random.write_text((material / "train.yaml").read_text().replace(f"hf: {material}/hf", "preset: tiny"))
    with pytest.raises(ConfigError, match=r"random\.yaml: model\.preset: a study compares"):
        read(write_study(base=str(random)))


def test_arms_are_measured_on_the_training_file_s_mixture_unless_told_otherwise(write_study, material, tmp_path):
    other = write_mix(tmp_path / "other", seq_length=16)
    cells = read(write_study(arms={"ce": {"data.mix": str(other)}, "mixcpt": {}}))
    assert cells.mix_path == material / "data" / "mix.json"
    write_report(standing(cells))
    told = (cells.out / "study.md").read_text()
    folder = Path(os.path.commonpath([other, cells.mix_path]))
    assert f"| data.mix | {other.relative_to(folder)} | {cells.mix_path.relative_to(folder)} |" in told
    assert "loss.by_kind" not in told  # of empty values there is nothing to tell
    assert read(write_study(measure={"mix": str(other)})).mix_path == other


def test_what_a_run_would_refuse_is_told_before_anything_starts(write_study, tmp_path, capsys):
    assert main(["study", write_study(arms={"ce": {"parallel": {"tensor": 3}}})]) == 2
    assert "arms.ce" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["study", write_study(measure={"gci": str(tmp_path / "none.jsonl")})]) == 2
    assert "none.jsonl" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["train", write_study()]) == 2
    assert "this file is for `mixcpt study`" in capsys.readouterr().err


def test_the_dry_run_says_what_it_takes_and_starts_nothing(write_study, tmp_path, capsys):
    assert main(["study", write_study(), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 = 4 (every learning rate of 2 arms, seed 1) + 2" in said and "12 models and the base" in said
    assert "MiB of checkpoints" in said and not (tmp_path / "out").exists()


def test_the_time_that_is_left_is_told_for_so_many_at_a_time(write_study):
    cells = read(write_study())
    cell = cells.sweep("ce")[0]
    write_json(cells.base_file, {"1": made_up(0.0, 0, 1.0)})
    write_json(cells.measured_file(cell), {alpha: made_up(cell.lr, cell.seed, float(alpha)) for alpha in ("1", "0.5")})
    cell.run_dir.mkdir()
    (cell.run_dir / "metrics.jsonl").write_text(json.dumps({"step": 4, "time/forward": 100.0}) + "\n")
    assert "1m40s of training a run so far, 3m20s left with 3 at a time" in foretold(cells, 3)[-1]  # 5 runs in 2 rounds


@pytest.mark.slow
def test_a_real_study_is_stopped_and_goes_on(write_study, tmp_path):
    """Two arms, one of them an adapter, at one rate and seed, by the command itself; ^C in between."""
    path = write_study(
        arms={"ce": {"loss.target": "none"}, "lora": {"loss.target": "none", "adapter": {"method": "lora", "rank": 2}}},
        lr=[1e-2],
        seeds=[1],
        keep_checkpoints=False,
        choose=None,
    )
    command = [sys.executable, "-m", "megatron_mixcpt.cli", "study", path, "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "out").glob("cells/*/log.txt")) and begun.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    begun.send_signal(signal.SIGINT)
    _, said = begun.communicate(timeout=120)
    assert begun.returncode == 75 and "of 2 runs are done; the same command goes on" in said
    assert not list((tmp_path / "out").glob("**/failed.json"))

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    cells = read(path)
    content = json.loads((cells.out / "study.json").read_text())
    assert content["complete"]
    for entry in content["runs"]:
        whole, half = entry["by_alpha"]["1"], entry["by_alpha"]["0.5"]
        assert whole["domain"] != 0 and whole["domain"] != half["domain"] and entry["tokens"] > 0
    assert not list(cells.out.glob("cells/*/run/checkpoints")) and list(cells.out.glob("cells/*/run/report.html"))
    # The base's own loss is what the measured gain is counted from.
    (facts,) = [s for s in content["base"]["measured"]["sources"] if s["name"] == "facts"]
    (after,) = [s for s in content["runs"][0]["by_alpha"]["1"]["measured"]["sources"] if s["name"] == "facts"]
    assert content["runs"][0]["by_alpha"]["1"]["domain"] == pytest.approx(math.log(facts["value"] / after["value"]))


@pytest.mark.parametrize("size", [(1280, 900), (400, 900)])
def test_the_page_shows_the_trade_the_arms_and_every_run(write_study, pretend, tmp_path, size):
    cells = read(write_study(measure={"gci": "facts:2"}, choose={"gain": "facts"}))
    pretend(cells, failing=["mixcpt-lr0.01"])
    run_study(cells, 1)
    document, console = open_page(cells.out / "study.html", size=size, dark=size[0] == 400)
    assert console == []
    assert document.count("<svg") == 2  # questions, which the rule goes by, and the loss
    drawn = ("ce, lr 0.001, seed 1, average at 0.5", "ce, lr 0.01, seed 1, average at 0.5")  # chosen or not
    for text in ("ce, lr 0.01, seed 1", *drawn, "mean of 2 seeds", "failed: the data is damaged"):
        assert text in document, text
