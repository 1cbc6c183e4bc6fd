"""Every kind of run, every layout: nothing mixes host and device, and steps wait for what docs/gpu.md lists alone."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_mixcpt.checkpoint import list_checkpoints
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.demo.base_model import save_tiny_tokenizer
from megatron_mixcpt.plan.estimate import make_plan
from megatron_mixcpt.select.config import SelectConfig
from megatron_mixcpt.select.select import select
from megatron_mixcpt.train.setup import check_settings
from tests.align.conftest import model_dir, stage1, tokenizer_dir
from tests.align.runs import select_values
from tests.device.claimed import claimed_device, deepspeed_claiming
from tests.device.runs import SAVE, VALIDATION, run
from tests.device.waits import undocumented
from tests.helpers.corpus import add_pairs, write_mix
from tests.helpers.nano import use_nano
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.model.families import make
from tests.teacher.runs import fill
from tests.train.runs import settings

__all__ = ["model_dir", "stage1", "tokenizer_dir"]

STEPS, MICRO_BATCHES = 2, 2
BASE = {
    "model": {"preset": "nano"},
    "data": {"num_workers": 0},
    "train": {"steps": STEPS, "micro_batch_size": 1, "global_batch_size": MICRO_BATCHES},
    "eval": {"every": STEPS, "max_samples": 1},
    "checkpoint": {"every": 0},
    "loss": {},
}
BF16 = {"dtype": "bf16"}
BEHIND = {"checkpoint": {"async": True, "every": 1}}
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
TWO_RANKS = {"global_batch_size": 2 * MICRO_BATCHES}
NO_TEACHER = {"loss": {"by_kind": {}, "target": "none"}}
# name -> (what differs from BASE, features for which docs/gpu.md lists more waits)
ONE = {
    "initial teacher": ({}, ()),
    "bf16, fused head, saved behind": ({"train": BF16, "loss": {"fuse_lm_head": True}} | BEHIND, ("async save",)),
    "recompute full, mft": ({"train": {"recompute": "full"}, "loss": {"target": "mft", "temperature": 2.0}}, ()),
    "recompute attention": ({"train": BF16 | {"recompute": "attention"}}, ()),
    "recompute mlp, no teacher": ({"train": {"recompute": "mlp"}} | NO_TEACHER, ()),
    "distributed optimizer": ({"train": BF16 | SHARDED}, ()),
    "lora": (
        {
            "adapter": {"method": "lora", "rank": 2, "dropout": 0.1},
            "teacher": {"source": "adapter_off"},
            "train": {"recompute": "full"},
        },
        (),
    ),
    "alora": ({"adapter": {"method": "alora", "rank": 2}, "train": BF16}, ()),
    "offload": ({"optimizer": {"offload": "cpu"}, "train": BF16}, ("offload",)),
    "sft": ({"align": {"method": "sft"}} | NO_TEACHER, ()),
    "dpo": ({"align": {"method": "dpo"}} | NO_TEACHER, ()),
}
EXPERTS = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2, "mlp_only_layers": []}
RESUMED = ("initial teacher", "distributed optimizer", "offload", "alora")
TWO = {
    "TP2+SP": ({"parallel": {"tensor": 2, "sequence": True}}, ()),
    "TP2+SP, fused head": (
        {"parallel": {"tensor": 2, "sequence": True}, "train": BF16, "loss": {"fuse_lm_head": True}},
        (),
    ),
    "PP2": ({"parallel": {"pipeline": 2}, "train": BF16}, ("pipeline",)),
    "PP2 interleaved": (
        {"model": {"preset": "tiny"}, "parallel": {"pipeline": 2, "interleave": 2}},
        ("interleaved pipeline",),
    ),
    "CP2": ({"parallel": {"context": 2}, "train": BF16}, ()),
    "CP2, dpo": ({"parallel": {"context": 2}, "align": {"method": "dpo"}} | NO_TEACHER, ()),
    "DP2, distributed optimizer": (
        {"train": BF16 | SHARDED | TWO_RANKS} | BEHIND,
        ("async save",),
    ),
    "EP2": (
        {"model": {"preset": None}, "parallel": {"expert": 2}, "train": BF16 | TWO_RANKS},
        ("experts over ranks",),
    ),
}


def values_of(mixes, folder, sections):
    merged = {name: BASE.get(name, {}) | sections.get(name, {}) for name in BASE | sections}
    kind = "pairs" if sections.get("align", {}).get("method") == "dpo" else "text"
    return settings(mixes[kind], folder, **merged)


@pytest.fixture(scope="module")
def mixes(tmp_path_factory):
    use_nano()
    folder = tmp_path_factory.mktemp("mixes")
    found = {name: write_mix(folder / name, seq_length=16, vocab_size=120, train=12) for name in ("text", "pairs")}
    add_pairs(found["pairs"])
    return found


@pytest.mark.parametrize("kind", ONE)
def test_a_run(tmp_path, mixes, kind):
    sections, features = ONE[kind]
    values = values_of(mixes, tmp_path / "run", sections)
    residency = run(values)
    assert undocumented(residency, features, steps=STEPS, micro_batches=MICRO_BATCHES) == []
    assert {SAVE, *([VALIDATION] if kind != "dpo" else [])} <= {wait.phase for wait in residency.waits}
    if kind in RESUMED:
        values["train"]["steps"] = STEPS + 1
        resumed = run(values)
        assert undocumented(resumed, features, steps=1, micro_batches=MICRO_BATCHES) == []
        newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
        assert newest.name == f"step_{STEPS + 1:08d}"


def test_a_cached_teacher_is_written_and_read(tmp_path, mixes):
    values = values_of(mixes, tmp_path / "run", {"teacher": {"source": "cached", "cache": str(tmp_path / "cache")}})
    with claimed_device() as residency:
        fill(values, top_k=8)
    assert residency.waits
    assert undocumented(run(values), (), steps=STEPS, micro_batches=MICRO_BATCHES) == []


def test_a_mixture_whose_routers_are_trained(tmp_path, mixes):
    make("qwen3-experts", tmp_path / "model", vocab_size=120, **EXPERTS)
    model = {"preset": None, "hf": str(tmp_path / "model")}
    train = BF16 | {"router": "trained", "router_balance": 0.1, "router_z": 0.01}
    residency = run(values_of(mixes, tmp_path / "run", {"model": model, "train": train}))
    assert undocumented(residency, (), steps=STEPS, micro_batches=MICRO_BATCHES) == []


TEACHERS = {"llama-untied": {}, "qwen3-experts": EXPERTS}


def on_deepspeed(folder, mix, family):
    """The configuration of a student of `family` whose teacher is another model of it, on DeepSpeed."""
    for name, layers in {"model": 2, "teacher": 3}.items():
        make(family, folder / name, vocab_size=120, **TEACHERS[family] | {"num_hidden_layers": layers})
        save_tiny_tokenizer(["the heron waits"], folder / name)
    mix = Path(shutil.copytree(mix.parent, folder / "data")) / mix.name
    save_tiny_tokenizer(["the heron waits"], mix.parent / "tokenizer")
    teacher = {"source": "deepspeed", "hf": str(folder / "teacher")}
    model = {"preset": None, "hf": str(folder / "model")}
    return values_of({"text": mix}, folder / "run", {"model": model, "teacher": teacher, "train": BF16})


@pytest.mark.parametrize("family", TEACHERS)
def test_another_model_on_deepspeed_teaches(tmp_path, mixes, family):
    values = on_deepspeed(tmp_path, mixes["text"], family)
    config = validate(Config, values, "test")
    with deepspeed_claiming():
        residency = run(values)
    foreseen = make_plan(config, *check_settings(config, 1), 1).stages[0].total
    assert foreseen == pytest.approx(residency.peak.total(), rel=0.1)
    assert undocumented(residency, ("teacher on DeepSpeed",), steps=STEPS, micro_batches=MICRO_BATCHES) == []


def test_selection(tmp_path, stage1, model_dir):
    values = select_values(stage1, {"hf": str(model_dir)}, tmp_path / "out")
    with claimed_device() as residency:
        select(validate(SelectConfig, values, "test"))
    assert residency.peak.total() > 0 and (tmp_path / "out" / "report.md").exists()


def each(rank, world_size, runs):
    """`{name: (port, configuration, features)}` -> `{name: what docs/gpu.md does not say of its waits}`."""
    use_nano()
    found = {}
    for name, (port, values, features) in runs.items():
        os.environ["MASTER_PORT"] = str(port)
        found[name] = undocumented(run(values), features, steps=STEPS, micro_batches=MICRO_BATCHES)
    return found


@pytest.fixture(scope="module")
def of_two(mixes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    make("qwen3-experts", folder / "experts", vocab_size=120, **EXPERTS)
    TWO["EP2"][0]["model"]["hf"] = str(folder / "experts")
    runs = {
        name: (free_port(), values_of(mixes, folder / name, sections), features)
        for name, (sections, features) in TWO.items()
    }
    return run_distributed(each, 2, runs, timeout=400)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", TWO)
def test_a_layout(of_two, layout):
    assert [found[layout] for found in of_two] == [[], []]
