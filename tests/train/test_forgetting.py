"""Runs with a forgetting budget: it is kept, resuming is exact, the result is taken, refusals name the key."""

import json

import pytest

from megatron_mixcpt.checkpoint import read_info
from megatron_mixcpt.checkpoint.store import list_checkpoints, result_of, step_of
from megatron_mixcpt.checkpoint.verify import find_checkpoint
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.observe.names import METRICS, documented
from megatron_mixcpt.train import loop
from megatron_mixcpt.train.setup import check_settings
from tests.helpers.corpus import write_mix
from tests.train.runs import settings

STEPS, EVERY = 40, 4


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """A domain of few tokens, and hardly anything else: learning it makes all other tokens unlikely."""
    folder = tmp_path_factory.mktemp("budget") / "data"
    sizes = {"seq_length": 16, "vocab_size": 64, "train": 64, "valid": 24}
    return write_mix(folder, **sizes, num_domain=8, weights=(0.98, 0.02))


def configuration(mix, run_dir, *, forget, **sections):
    train = {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 4, "lr": 5e-4, "schedule": "constant"}
    values = {
        "train": train | sections.pop("train", {}),
        "loss": {"target": "plain", "kd_weight": 0.1, "by_kind": {}},
    } | sections
    if forget is not None:
        values["forget"] = {"on": ["tasks"], "every": EVERY} | forget
    return validate(Config, settings(mix, run_dir, **values), "test")


def train(mix, run_dir, **sections):
    loop.train(configuration(mix, run_dir, **sections))
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last(rows, name):
    return next(row[name] for row in reversed(rows) if name in row)


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


def test_the_best_within_the_budget_is_the_result_and_is_kept(mix, tmp_path):
    rows = train(mix, tmp_path / "run", forget={"budget": 0.12}, checkpoint={"every": EVERY, "keep": 1})
    parent = tmp_path / "run" / "checkpoints"
    measured = [row for row in rows if "forget/forgotten" in row]
    best = max((row for row in measured if row["forget/forgotten"] <= 0.12), key=lambda row: row["forget/gain"])
    result = result_of(parent)
    assert step_of(result) == best["step"] and find_checkpoint(tmp_path / "run") == result
    assert {step_of(path) for path in list_checkpoints(parent)} == {best["step"], STEPS}
    assert json.loads((parent / "latest.json").read_text())["result"]["within"]
    names = {name for row in rows for name in row} - {"step"}
    assert all(documented(name) for name in names)
    assert {name for name in METRICS if name.startswith("forget/") and "<" not in name} <= names


def test_an_average_is_measured_and_taken_where_no_checkpoint_kept_the_budget(mix, tmp_path):
    forget = {"budget": 0.2, "every": 30, "average": True}
    rows = train(mix, tmp_path / "run", forget=forget, train={"steps": 30, "lr": 3e-3})
    assert last(rows, "forget/forgotten") > 0.2
    result = result_of(tmp_path / "run" / "checkpoints")
    latest = json.loads((tmp_path / "run" / "checkpoints" / "latest.json").read_text())
    assert 0 < latest["result"]["alpha"] < 1 and latest["result"]["within"]
    assert find_checkpoint(tmp_path / "run") == result and read_info(result).optimizer_step is None
    assert step_of(list_checkpoints(tmp_path / "run" / "checkpoints")[0]) == 30  # training goes on from its end


REFUSED = [
    ({"loss": {"target": "none"}, "teacher": {"source": "none"}}, "forget.budget .* set loss.target"),
    ({"loss": {"kd_weight": 0.0}}, "forget.budget .* set loss.target"),
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
