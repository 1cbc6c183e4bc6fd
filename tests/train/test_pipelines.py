"""Uneven and interleaved pipelines, and what is computed again in backward, train the model of one process, in fp32."""

import os
import shutil

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.train.loop import train
from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.train.runs import keep_only_step, losses, run_all, saved_tensors, settings

pytestmark = pytest.mark.slow

NO_TEACHER = {"loss": {"target": "none"}, "teacher": {"source": "none"}}
LORA = {"adapter": {"method": "lora", "rank": 4}, "teacher": {"source": "adapter_off"}}
ALORA = {"adapter": {"method": "alora", "rank": 8, "heads": 2}, "teacher": {"source": "adapter_off"}}
V2, V3 = {"parallel": {"pipeline": 2, "interleave": 2}}, {"parallel": {"pipeline": 2, "interleave": 3}}
ONE = {
    "one": {},
    "one no teacher": NO_TEACHER,
    "one LoRA": LORA,
    "one ALoRA": ALORA,
    "one ALoRA mlp": ALORA | {"train": {"recompute": "mlp"}},
    "one ALoRA attention": ALORA | {"train": {"recompute": "attention"}},
}
TWO = {
    "PP2 of 2 and 4 layers": {"parallel": {"pipeline": 2, "layers_per_stage": [2, 4]}},
    "PP2xV2": V2,
    "PP2xV3": V3,
    "PP2xV2 by hand": {"parallel": {"pipeline": 2, "interleave": 2, "layers_per_stage": [1, 3, 1, 1]}},
    "PP2xV3 fused head": V3 | {"loss": {"fuse_lm_head": True}},
    "PP2xV2 attention": V2 | {"train": {"recompute": "attention"}},
    "PP2xV2 no teacher": V2 | NO_TEACHER,
    "PP2xV3 no teacher": V3 | NO_TEACHER,
    "PP2xV2 LoRA": V2 | LORA,
    "PP2xV2 ALoRA mlp": V2 | ALORA | {"train": {"recompute": "mlp"}},
}
FOUR = {
    "PP4 of 2, 1, 1 and 2 layers": {"parallel": {"pipeline": 4, "layers_per_stage": [2, 1, 1, 2]}},
    "PP2xV3 DP2 distributed optimizer": V3 | {"train": {"distributed_optimizer": True, "overlap_grad_reduce": True}},
}
# name -> (run that wrote the checkpoint of step 2, ranks and layout that go on from it)
RESUMED = {
    "PP2xV3 from one": ("one", 2, V3),
    "PP2 uneven from one": ("one", 2, {"parallel": {"pipeline": 2, "layers_per_stage": [4, 2]}}),
    "PP2xV2 distributed optimizer from PP2xV3": (
        "PP2xV3 from one",
        2,
        V2 | {"train": {"distributed_optimizer": True}},
    ),
    "one from PP2xV3": ("PP2xV3 from one", 1, {}),
    "CP2 from one": ("one", 2, {"parallel": {"context": 2}}),
    "one from CP2": ("CP2 from one", 1, {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A mixture, and what the configurations of all runs have in common: a model of six layers, embeddings tied."""
    folder = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 6, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=256, tie_word_embeddings=True, **sizes, **heads))
    model.save_pretrained(folder / "hf")
    return write_mix(folder / "data"), {"model": {"preset": None, "hf": str(folder / "hf")}}


@pytest.fixture(scope="module")
def results(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    mix, common = base

    def run(layouts, world_size):
        runs = {
            name: (free_port(), settings(mix, folder / name, **{"loss": {}, "train": {}} | common | sections))
            for name, sections in layouts.items()
        }
        return run_distributed(run_all, world_size, runs, timeout=300)[0]

    return run(ONE, 1) | run(TWO, 2) | run(FOUR, 4)


def like(name):
    """The run of one process with the same mathematics."""
    return "one" + next((f" {kind}" for kind in ("no teacher", "ALoRA", "LoRA") if kind in name), "")


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in (*ONE, *TWO, *FOUR) if name != like(name)])
def test_the_pipeline_trains_like_one_process(results, name):
    one, other = results[like(name)], results[name]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6)
    np.testing.assert_allclose(other["norms"], one["norms"], rtol=1e-5)
    np.testing.assert_allclose(other["norms"], other["megatron's norms"], rtol=1e-6)
    assert other["weights"].keys() == one["weights"].keys()
    for key, weight in one["weights"].items():
        np.testing.assert_allclose(other["weights"][key], weight, atol=5e-5, rtol=0, err_msg=key)
    for key, gradient in other["gradients"].items():
        scale = np.abs(one["gradients"][key]).max()
        np.testing.assert_allclose(gradient, one["gradients"][key], atol=1e-6 * max(scale, 1.0), rtol=0, err_msg=key)
    for key, value in one["validation"].items():
        np.testing.assert_allclose(other["validation"][key], value, rtol=1e-5, err_msg=key)


def _train_all(rank, world_size, runs):
    for port, values in runs:
        os.environ["MASTER_PORT"] = str(port)
        train(validate(Config, values, "test"))


@pytest.fixture(scope="module")
def resumed(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    mix, common = base

    def values(name, sections):
        return settings(mix, folder / name, checkpoint={"every": 1, "keep": 9}, **common, **sections)

    run_distributed(_train_all, 1, [(free_port(), values("one", {}))], timeout=300)
    for name, (source, ranks, sections) in RESUMED.items():
        shutil.copytree(folder / source / "checkpoints", folder / name / "checkpoints")
        keep_only_step(folder / name, 2 if source == "one" else 3)
        run_distributed(_train_all, ranks, [(free_port(), values(name, sections))], timeout=300)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_in_another_pipeline_as_if_nothing_had_changed(resumed, name):
    expected, found = losses(resumed / "one"), losses(resumed / name)
    assert sorted(found)[-1] == 4
    np.testing.assert_allclose([found[step] for step in found], [expected[step] for step in found], rtol=1e-6)
    ends = [saved_tensors(resumed / run / "checkpoints" / "step_00000004") for run in ("one", name)]
    assert ends[0].keys() == ends[1].keys()
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=0, atol=5e-5, msg=key)


@pytest.mark.distributed
def test_an_interleaved_run_is_exported_like_one_of_one_process(resumed, tmp_path):
    from safetensors.torch import load_file

    from megatron_mixcpt.cli import main

    exported = []
    for name in ("one", "PP2xV3 from one"):
        assert main(["export", str(resumed / name), "--out", str(tmp_path / name)]) == 0
        exported.append(load_file(tmp_path / name / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    for key, tensor in exported[0].items():
        torch.testing.assert_close(exported[1][key], tensor, rtol=0, atol=5e-5, msg=key)
