"""Runs with a forgetting budget: it is kept, resuming is exact, the result is taken, refusals name the key."""

import contextlib
import html
import json
import os
import shutil
import signal

import pytest

from megatron_mixcpt.architecture.architecture import PRESETS
from megatron_mixcpt.checkpoint import read_info
from megatron_mixcpt.checkpoint.origin import find_origin
from megatron_mixcpt.checkpoint.store import list_checkpoints, result_of, step_of
from megatron_mixcpt.checkpoint.verify import find_checkpoint
from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.convert.card import model_card
from megatron_mixcpt.errors import ConfigError, StoppedError
from megatron_mixcpt.observe.names import METRICS, documented
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.train import loop, validation
from megatron_mixcpt.train.cache_teacher import cache_teacher
from megatron_mixcpt.train.forgetting import Forgetting
from megatron_mixcpt.train.guard import StepGuard
from megatron_mixcpt.train.setup import check_settings
from tests.helpers.corpus import edit_mix, write_mix
from tests.helpers.nano import NANO, use_nano
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.train.runs import keep_only_step, settings

STEPS, EVERY = 40, 4
DELTA = "forget/tasks/delta"  # what was forgotten, also where there is no budget
BUDGETS, SEEDS = (0.02, 0.05, 0.1), (0, 1)


@pytest.fixture(autouse=True, scope="module")
def nano():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", NANO)
        yield


def write_data(folder):
    """A domain of few tokens, and hardly anything else: learning it makes all other tokens unlikely."""
    sizes = {"seq_length": 16, "vocab_size": 64, "train": 64, "valid": 24}
    return write_mix(folder, **sizes, num_domain=8, weights=(0.98, 0.02))


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("budget") / "data")


def values(mix, run_dir, *, forget, **sections):
    train = {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 4, "lr": 2e-3, "schedule": "constant"}
    chosen = {
        "model": {"preset": "nano"},
        "train": train | sections.pop("train", {}),
        "loss": {"target": "plain", "by_kind": {}} | sections.pop("loss", {}),
    } | sections
    if forget is not None:
        chosen["forget"] = {"on": ["tasks"], "every": EVERY} | forget
    return settings(mix, run_dir, **chosen)


def configuration(mix, run_dir, **sections):
    return validate(Config, values(mix, run_dir, **sections), "test")


def train(mix, run_dir, **sections):
    loop.train(configuration(mix, run_dir, **sections))
    return rows_of(run_dir)


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rows_until(rows, step):
    return [row for row in rows if row["step"] <= step]


def measured(rows):
    return [row for row in rows if "forget/forgotten" in row]


def last(rows, name):
    return next(row[name] for row in reversed(rows) if name in row)


@pytest.fixture(scope="module")
def proof(mix, tmp_path_factory):
    """{(budget or None, seed): (rows, what was measured of the result)}"""
    folder = tmp_path_factory.mktemp("proof")
    runs = {}
    for seed in SEEDS:
        for budget in (*BUDGETS, None):
            run_dir = folder / f"{budget}-{seed}"
            forget = budget and {"budget": budget}
            sections = {"train": {"seed": seed}, "checkpoint": {"keep": 1}}
            rows = train(mix, run_dir, forget=forget, eval={"every": STEPS if budget is None else 0}, **sections)
            result = step_of(result_of(run_dir / "checkpoints")) if budget else STEPS
            runs[budget, seed] = rows, next(row for row in rows if row["step"] == result and DELTA in row)
    return runs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_budget_is_kept_within_its_noise_from_the_first_step_to_the_last(proof, budget, seed):
    rows, result = proof[budget, seed]
    assert all(row["forget/forgotten"] <= budget + row["forget/noise"] for row in measured(rows))
    assert result[DELTA] <= budget and last(rows, "forget/forgotten") <= budget + last(rows, "forget/noise")
    assert max(row["forget/forgotten"] for row in measured(rows)) > 0.5 * budget  # and not by learning nothing


@pytest.mark.parametrize("seed", SEEDS)
def test_without_control_the_same_run_breaks_each_of_the_budgets(proof, seed):
    _, end = proof[None, seed]
    noise = last(proof[max(BUDGETS), seed][0], "forget/noise")
    assert end[DELTA] > max(BUDGETS) + noise


@pytest.mark.parametrize("seed", SEEDS)
def test_more_budget_learns_more(proof, seed):
    gains = [proof[budget, seed][1]["forget/gain"] for budget in BUDGETS]
    assert gains == sorted(gains) and gains[-1] > 2 * gains[0] > 0
    assert gains[-1] < -proof[None, seed][1]["forget/facts/delta"]


def test_a_run_in_two_pieces_is_the_run_in_one(mix, tmp_path):
    sections = {"forget": {"budget": 0.05}, "checkpoint": {"every": 6}}
    whole = train(mix, tmp_path / "whole", **sections, train={"steps": 12})
    train(mix, tmp_path / "cut", **sections, train={"steps": 6})
    pieces = train(mix, tmp_path / "cut", **sections, train={"steps": 12})
    kept = ("train/loss", "train/kl_base", "forget/kd_weight", "forget/expected", "forget/forgotten", "optim/grad_norm")
    found = [[{k: row[k] for k in ("step", *kept) if k in row} for row in rows] for rows in (whole, pieces)]
    compared = [[row for row in rows if len(row) > 1] for rows in found]  # not those of saving and stopping
    assert compared[0] == compared[1]
    assert (
        len({row["forget/kd_weight"] for row in whole if "forget/kd_weight" in row}) > 2
    )  # there was something to keep
    states = [
        read_info(list_checkpoints(tmp_path / name / "checkpoints")[0]).training.forget for name in ("whole", "cut")
    ]
    assert states[0] == states[1]


LAYOUTS = {"TP2": {"parallel": {"tensor": 2}}, "PP2": {"parallel": {"pipeline": 2}}, "DP2": {}}


def _train_all(rank, world_size, runs):
    use_nano()
    for port, chosen in runs:
        os.environ["MASTER_PORT"] = str(port)
        loop.train(validate(Config, chosen, "test"))


def test_a_run_goes_on_in_another_layout_with_the_decisions_that_it_would_have_made(tmp_path):
    mix = write_data(tmp_path / "data")
    halves = {"train": {"micro_batch_size": 2, "steps": 16}, "checkpoint": {"every": 4, "keep": 9}}

    def chosen(name, **sections):
        return values(mix, tmp_path / name, forget={"budget": 0.02}, **halves, **sections)

    loop.train(validate(Config, chosen("whole"), "test"))
    for name in LAYOUTS:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        keep_only_step(tmp_path / name, 8)
    again = [(free_port(), chosen(name, **sections)) for name, sections in LAYOUTS.items()]
    again_cut = (free_port(), chosen("TP2 cut", **LAYOUTS["TP2"]))
    run_distributed(_train_all, 2, again, timeout=300)
    shutil.copytree(tmp_path / "TP2", tmp_path / "TP2 cut")
    keep_only_step(tmp_path / "TP2 cut", 12)
    run_distributed(_train_all, 2, [again_cut], timeout=300)
    expected = {row["step"]: row for row in rows_of(tmp_path / "whole") if "forget/kd_weight" in row}
    for name in LAYOUTS:
        rows = [row for row in rows_of(tmp_path / name) if "forget/kd_weight" in row][-8:]
        assert [row["step"] for row in rows] == list(range(9, 17))
        for row in rows:
            for key in ("forget/kd_weight", "forget/lr_factor", "forget/expected", "train/kl_base", "train/loss"):
                assert row[key] == pytest.approx(expected[row["step"]][key], rel=2e-3), (name, row["step"], key)
    assert len({round(row["forget/kd_weight"], 3) for row in expected.values()}) > 4  # there was something to decide
    whole, cut = (
        read_info(list_checkpoints(tmp_path / name / "checkpoints")[0]).training for name in ("TP2", "TP2 cut")
    )
    assert whole.forget == cut.forget and whole.guard == cut.guard  # within a layout to the bit


def test_a_skipped_step_moves_nothing(mix, tmp_path, monkeypatch):
    """Neither the weights nor what is known of them: a step that was not taken says nothing of the model."""
    admits = StepGuard.admits
    count = []

    def skip_one(guard, loss, norm):
        count.append(0)
        return admits(guard, float("nan") if len(count) == 6 else loss, norm)

    monkeypatch.setattr(StepGuard, "admits", skip_one)
    rows = train(mix, tmp_path / "run", forget={"budget": 0.02}, train={"steps": 8})
    told = {row["step"]: row for row in rows if "forget/kd_weight" in row}
    assert told[6]["optim/skipped"] == 1
    rows = [told[step] for step in (5, 6, 7, 8)]
    expected = [row["forget/expected"] for row in rows]
    pressures = [row["forget/kd_weight"] / row["forget/lr_factor"] for row in rows]
    assert expected[0] == expected[1] != expected[2]
    assert pressures[1] == pressures[2] != pressures[3]  # of a step it is what was decided after the one before


def test_on_another_mixture_the_divergence_is_measured_anew_and_other_held_out_text_is_refused(tmp_path):
    mix = write_data(tmp_path / "data")
    train(mix, tmp_path / "run", forget={"budget": 0.05}, train={"steps": 6})
    edit_mix(mix, lambda content: [source.update(weight=0.5) for source in content["sources"]])
    rows = train(mix, tmp_path / "run", forget={"budget": 0.05}, train={"steps": 8})
    assert rows[-1]["step"] == 8 and last(rows, "forget/forgotten") < 0.1
    first = next(row for row in rows if row["step"] == 7 and "forget/expected" in row)
    assert first["forget/expected"] == pytest.approx(last(rows_until(rows, 6), "forget/forgotten"), abs=0.05)
    with pytest.raises(ConfigError, match="held-out sequences of tasks are not those that were measured"):
        train(mix, tmp_path / "run", forget={"budget": 0.05}, train={"steps": 10}, eval={"max_samples": 9})


def test_a_run_that_goes_on_under_another_budget_is_held_to_that_one(mix, tmp_path):
    """The best checkpoint until then is no result where it is beyond the new budget."""
    rows = train(mix, tmp_path / "run", forget={"budget": 0.1}, train={"steps": 8})
    (parent, saved), first = (tmp_path / "run" / "checkpoints", 8), last(rows, "forget/forgotten")
    assert step_of(result_of(parent)) == saved and first > 0.02
    train(mix, tmp_path / "run", forget={"budget": 0.9 * first}, train={"steps": 9, "lr": 1e-6})
    chosen = json.loads((parent / "latest.json").read_text())
    found = {row["step"]: row["forget/forgotten"] for row in measured(rows_of(tmp_path / "run"))}
    assert chosen["result"]["within"] == (found[chosen["step"]] <= 0.9 * first)


def test_a_run_that_ended_because_no_pressure_kept_its_budget_goes_on_under_another(mix, tmp_path):
    chosen = {"forget": {"budget": 1e-4, "every": 2}, "train": {"steps": 30, "lr": 2e-2}}
    ended = train(mix, tmp_path / "run", **chosen)[-1]["step"]
    assert ended < 30 and train(mix, tmp_path / "run", **chosen)[-1]["step"] == ended
    rows = train(mix, tmp_path / "run", forget={"budget": 5.0, "every": 2}, train={"steps": 30, "lr": 1e-4})
    assert rows[-1]["step"] == 30


KINDS = {
    "LoRA": {"adapter": {"method": "lora", "rank": 8}, "teacher": {"source": "adapter_off"}, "train": {"lr": 2e-2}},
    "SFT": {"align": {"method": "sft"}},
    "cached teacher": {"teacher": {"source": "cached"}},
    "swapped teacher": {"loss": {"target": "swap"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_kept_in_every_kind_of_training(mix, tmp_path, kind):
    sections = {key: dict(section) for key, section in KINDS[kind].items()}
    sections["train"] = {"steps": 16} | sections.get("train", {})
    if kind == "cached teacher":
        sections["teacher"]["cache"] = str(tmp_path / "cache")
        config = configuration(mix, tmp_path / "run", forget={"budget": 0.02}, **sections)
        with StopRequest() as stop, contextlib.redirect_stdout(None):
            cache_teacher(config, stop, top_k=8, bits=32)
    rows = train(mix, tmp_path / "run", forget={"budget": 0.02}, **sections)
    result = step_of(result_of(tmp_path / "run" / "checkpoints"))
    found = next(row for row in measured(rows) if row["step"] == result)
    assert found["forget/forgotten"] <= 0.02 and found["forget/gain"] > 0
    assert last(rows, "forget/forgotten") <= 0.02 + last(rows, "forget/noise")
    pressed = [row for row in rows if "forget/lr_factor" in row]
    assert len({(row["forget/kd_weight"], row["forget/lr_factor"]) for row in pressed}) > 2


def test_every_decision_is_told_in_words_with_its_step_on_the_console_the_page_and_to_wandb(mix, tmp_path, capsys):
    """What is in metrics.jsonl is what wandb is given (tests/observe)."""
    rows = train(mix, tmp_path / "run", forget={"budget": 0.02}, train={"steps": 12})
    console, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    told = [(row["step"], row["forget/decision"]) for row in rows if "forget/decision" in row]
    for step, decision in told:
        assert f"step {step}: {decision}" in html.unescape(page)
        assert decision in console
    assert {4, 8, 12} <= {step for step, _ in told}  # at each measurement, and when it moved far
    assert told[-1][1].startswith("result: step ") and "distillation weight x 4, learning rate x" in str(told)
    assert "the divergence from the base model is" in str(told) and "tasks forgotten" in str(told)


def test_the_best_within_the_budget_is_the_result_and_is_kept(mix, tmp_path):
    rows = train(mix, tmp_path / "run", forget={"budget": 0.12}, checkpoint={"every": EVERY, "keep": 1})
    parent = tmp_path / "run" / "checkpoints"
    best = max((row for row in measured(rows) if row["forget/forgotten"] <= 0.12), key=lambda row: row["forget/gain"])
    result = result_of(parent)
    assert step_of(result) == best["step"] and find_checkpoint(tmp_path / "run") == result
    assert {step_of(path) for path in list_checkpoints(parent)} == {best["step"], STEPS}
    assert json.loads((parent / "latest.json").read_text())["result"]["within"]
    names = {name for row in rows for name in row} - {"step"}
    assert all(documented(name) for name in names)
    assert {name for name in METRICS if name.startswith("forget/") and "<" not in name} <= names


@pytest.mark.parametrize("steps, stopped", [(8, 3), (12, 3)], ids=["at the end", "in between"])
def test_a_checkpoint_whose_validation_a_stop_cut_short_can_still_be_the_result(
    mix, tmp_path, monkeypatch, steps, stopped
):
    chosen = {"forget": {"budget": 5.0}, "train": {"steps": steps}, "checkpoint": {"every": 4, "keep": 9}}
    whole = measured(train(mix, tmp_path / "whole", **chosen))
    calls, validate_all = [], validation.validate

    def stop_meanwhile(*arguments, **options):
        calls.append(1)
        if len(calls) == stopped:  # the first is before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return validate_all(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "validate", stop_meanwhile)
        with pytest.raises(StoppedError, match=f"stopped at step {4 * (stopped - 1)} of {steps} as asked, and saved"):
            train(mix, tmp_path / "run", **chosen)
    rows = measured(train(mix, tmp_path / "run", **chosen))
    assert [row["forget/gain"] for row in rows] == [row["forget/gain"] for row in whole]
    results = [step_of(result_of(tmp_path / name / "checkpoints")) for name in ("run", "whole")]
    assert results[0] == results[1] == steps


def test_a_stop_before_the_first_step_does_not_say_that_it_saved(mix, tmp_path, monkeypatch):
    measure = validation.validate
    told = []

    def stop_meanwhile(*arguments, **options):
        told.append(os.kill(os.getpid(), signal.SIGTERM))
        return measure(*arguments, **options)

    monkeypatch.setattr(validation, "validate", stop_meanwhile)
    with pytest.raises(StoppedError, match="before the first step; nothing is lost"):
        train(mix, tmp_path / "run", forget={"budget": 5.0})
    assert told and not list_checkpoints(tmp_path / "run" / "checkpoints")


def test_when_the_best_could_not_be_saved_the_best_before_it_stays(mix, tmp_path, monkeypatch):
    """A save in the background fails when others have been measured since."""
    chosen = {"forget": {"budget": 5.0}, "train": {"steps": 12}, "checkpoint": {"every": 4, "keep": 1}}
    best = []
    measure = Forgetting.measured

    def measured_and_told(self, step, items, *, saves):
        found = measure(self, step, items, saves=saves and step < 12)
        if step == 12:  # only now it is known that the checkpoint of step 8 was not written
            self.unsaved(8)
        best.append((step, self.best_step))
        return found

    monkeypatch.setattr(Forgetting, "measured", measured_and_told)
    train(mix, tmp_path / "run", **chosen)
    assert best == [(0, None), (4, 4), (8, 8), (12, 4)]


def test_a_checkpoint_written_in_the_background_counts_the_tokens_of_its_own_step(mix, tmp_path):
    chosen = {"train": {"steps": 6}, "checkpoint": {"every": 1, "keep": 9, "async": True}}
    rows = train(mix, tmp_path / "run", forget=None, **chosen)
    seen = {row["step"]: row["train/tokens"] for row in rows if "train/loss" in row}
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    found = {step_of(path): sum(read_info(path).training.tokens_by_source.values()) for path in checkpoints}
    assert found == seen and len(found) == 6


@pytest.mark.parametrize(("kept", "budget", "every", "lr"), [(True, 0.02, EVERY, 2e-3), (False, 0.012, 12, 3e-3)])
def test_an_average_with_the_start_is_taken_where_it_learned_more_within_the_budget(
    mix, tmp_path, capsys, kept, budget, every, lr
):
    """With an early checkpoint within the budget, or with none."""
    forget = {"budget": budget, "every": every, "average": True}
    rows = train(mix, tmp_path / "run", forget=forget, train={"steps": 12, "lr": lr})
    assert last(rows, "forget/forgotten") > budget
    told = [row.get("forget/decision", "") for row in measured(rows)]
    assert all(f"of {6 * budget:g} nats a token before averaging" in text for text in told)
    assert any(row["forget/forgotten"] <= budget for row in measured(rows)) == kept
    result = result_of(tmp_path / "run" / "checkpoints")
    latest = json.loads((tmp_path / "run" / "checkpoints" / "latest.json").read_text())
    assert 0 < latest["result"]["alpha"] < 1 and latest["result"]["within"]
    assert find_checkpoint(tmp_path / "run") == result and read_info(result).optimizer_step is None
    card, found = model_card(find_origin(tmp_path / "run")), latest["result"]
    assert f"averaged: {found['alpha']:g} x step 12 + {1 - found['alpha']:g} x the starting weights" in card
    assert f"measured: {found['forgotten']:.4f} nats a token forgotten, {found['gain']:.4f} learned" in card
    assert found["forgotten"] <= budget and "Perplexity" not in card  # which was measured of the end alone
    assert step_of(list_checkpoints(tmp_path / "run" / "checkpoints")[0]) == 12  # training goes on from its end
    for name, warned in (("result", False), ("newest", True)):
        capsys.readouterr()
        assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / name)]) == 0
        assert ("no checkpoint was chosen that keeps its forgetting budget" in capsys.readouterr().err) is warned
        (tmp_path / "run" / "checkpoints" / "latest.json").unlink(missing_ok=True)  # as before the end of a run


REFUSED = [
    ({"loss": {"target": "none"}, "teacher": {"source": "none"}}, "forget.budget .* set loss.target"),
    ({"loss": {"kd_weight": 0.0}}, "forget.budget .* set loss.target"),
    (
        {"loss": {"target": "plain", "by_kind": {"domain": {"kd": 0}, "instruction": {"kd": 0}}}},
        "forget.budget .* kd to 0 for all .*domain, instruction",
    ),
    ({"forget": {"on": ["poems"]}}, "forget.on: poems is no source .* facts .domain., tasks .instruction."),
    ({"forget": {"on": ["facts", "tasks"]}}, "forget.on: .* holds out nothing beside facts, tasks"),
    ({"eval": {"max_samples": 1}}, "forget.on: fewer than 2 held-out sequences of tasks"),
    ({"forget": {"average": True}, "adapter": {"method": "lora"}}, "forget.average .* adapter"),
    ({"align": {"method": "dpo"}, "loss": {}}, "forget is kept .* align.method dpo"),
    (
        {"teacher": {"source": "deepspeed", "hf": "other"}},
        "teacher.hf other is not the model that is trained",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_what_cannot_be_kept_is_refused_by_name(mix, tmp_path, changes, message):
    changes = {"forget": {"budget": 0.1} | changes.pop("forget", {})} | changes
    loss = changes.pop("loss", {"target": "plain"})
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        values = settings(mix, tmp_path / "run", **changes)
        check_settings(validate(Config, values | {"loss": loss}, "test"), 1)


def test_a_run_that_began_without_a_budget_is_not_gone_on_with_one(mix, tmp_path):
    train(mix, tmp_path / "run", forget=None, train={"steps": 2})
    with pytest.raises(ConfigError, match="was trained without a budget"):
        train(mix, tmp_path / "run", forget={"budget": 0.1}, train={"steps": 4})
