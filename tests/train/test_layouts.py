"""Every process grid trains the same model: losses, gradients and weights against one process, fp32, with a teacher."""

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.train.runs import run_all, settings

ONE = {
    "one": {},
    "one at micro-batch 1": {"train": {"micro_batch_size": 1}},
    "one fused head": {"loss": {"fuse_lm_head": True}},
}
TWO = {
    "TP2": {"parallel": {"tensor": 2}},
    "TP2+SP": {"parallel": {"tensor": 2, "sequence": True}},
    "PP2": {"parallel": {"pipeline": 2}},
    "DP2": {},
    "CP2": {"parallel": {"context": 2}},
    "CP2 fused head": {"parallel": {"context": 2}, "loss": {"fuse_lm_head": True}},
    "DP2 overlapped": {"train": {"overlap_grad_reduce": True}},
    "DP2 distributed optimizer": {"train": {"distributed_optimizer": True}},
    "PP2 fused head": {"parallel": {"pipeline": 2}, "loss": {"fuse_lm_head": True}},
    "TP2+SP fused head": {"parallel": {"tensor": 2, "sequence": True}, "loss": {"fuse_lm_head": True}},
    "TP2 recompute": {"parallel": {"tensor": 2}, "train": {"recompute": "full"}},
}
UNTIED = {"untied": {}}  # an output head of its own, and biases of q, k and v
UNTIED_TWO = {
    "untied TP2+SP": {"parallel": {"tensor": 2, "sequence": True}},
    "untied PP2": {"parallel": {"pipeline": 2}},
    "untied PP2 fused head": {"parallel": {"pipeline": 2}, "loss": {"fuse_lm_head": True}},
}
FOUR = {
    "TP2xPP2": {"parallel": {"tensor": 2, "pipeline": 2}},
    "CP4": {"parallel": {"context": 4}},
    "PP2xCP2": {"parallel": {"pipeline": 2, "context": 2}},
    "TP2xCP2 SP recompute": {
        "parallel": {"tensor": 2, "context": 2, "sequence": True},
        "train": {"recompute": "full"},
    },
    "CP2xDP2 distributed optimizer": {"parallel": {"context": 2}, "train": {"distributed_optimizer": True}},
    "TP2xDP2 SP distributed optimizer": {
        "parallel": {"tensor": 2, "sequence": True},
        "train": {"distributed_optimizer": True},
    },
}


BF16 = {"dtype": "bf16"}


def write_untied(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=256, tie_word_embeddings=False, **sizes, **heads))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # transformers begins with zeros
    model.save_pretrained(folder)
    return {"model": {"preset": None, "hf": str(folder)}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    mix = write_mix(folder / "data")
    hf = write_untied(folder / "hf")

    def run(layouts, world_size):
        runs = {
            name: (free_port(), settings(mix, folder / name, **{"loss": {}, "train": {}} | sections))
            for name, sections in layouts.items()
        }
        return run_distributed(run_all, world_size, runs, timeout=300)[0]

    def untied(layouts):
        return {name: sections | hf for name, sections in layouts.items()}

    one = ONE | untied(UNTIED) | {"bf16": {"train": BF16}}
    two = TWO | untied(UNTIED_TWO) | {"bf16 TP2+SP": TWO["TP2+SP"] | {"train": BF16}}
    return run(one, 1) | run(two, 2) | run(FOUR, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [name for name in (*ONE, *TWO, *UNTIED_TWO, *FOUR) if name not in ("one", "untied")])
def test_layout_trains_like_one_process(results, layout):
    one, other = results["untied" if layout.startswith("untied") else "one"], results[layout]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6)
    np.testing.assert_allclose(other["norms"], one["norms"], rtol=1e-5)
    np.testing.assert_allclose(other["norms"], other["megatron's norms"], rtol=1e-6)
    assert other["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        # Adam divides by the root of tiny moments: a rounding error of a gradient near 0 is seen in full.
        np.testing.assert_allclose(other["weights"][name], weight, atol=5e-5, rtol=0, err_msg=name)
    for name, gradient in other["gradients"].items():
        scale = np.abs(one["gradients"][name]).max()
        assert scale > 0, f"{name} has no gradient"
        np.testing.assert_allclose(gradient, one["gradients"][name], atol=1e-6 * max(scale, 1.0), rtol=0, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["TP2+SP", "PP2", "DP2", "untied PP2", "TP2xPP2"])
def test_layout_scores_held_out_data_like_one_process(results, layout):
    one, other = results["untied" if layout.startswith("untied") else "one"], results[layout]
    assert one["validation"].keys() == other["validation"].keys() != set()
    for name, value in one["validation"].items():
        np.testing.assert_allclose(other["validation"][name], value, rtol=1e-5, err_msg=name)


@pytest.mark.distributed
def test_sharding_in_bf16_costs_no_more_precision_than_bf16_itself(results):
    exact, one, other = results["one"]["gradients"], results["bf16"]["gradients"], results["bf16 TP2+SP"]["gradients"]
    for name, gradient in exact.items():
        scale = np.linalg.norm(gradient)
        errors = [np.linalg.norm(run[name] - gradient) / scale for run in (one, other)]
        assert 0 < errors[0] < 0.05, f"{name}: bf16 is off by {errors[0]:.3f}"
        assert errors[1] < 2 * errors[0] + 1e-3, f"{name}: {errors[1]:.3f} against {errors[0]:.3f} in one process"


def test_the_loss_falls(results):
    assert results["one"]["losses"][-1] < results["one"]["losses"][0]
