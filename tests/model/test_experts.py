"""Mixtures of experts, in one process: the two ways to multiply, counts, and what is refused."""

import dataclasses
import math

import pytest
import torch

from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.architecture.layout import Place, is_of_experts, shard, unshard, whole_shapes
from megatron_mixcpt.architecture.shapes import SHAPES
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.errors import ConfigError
from tests.model.grid import EXPERTS, TINY


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0]])
def test_one_kernel_computes_what_one_product_an_expert_does(counts):
    from megatron_mixcpt.model.experts import grouped_linear, sequential_linear

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 16, generator=generator), torch.randn(4, 24, 16, generator=generator)
    gradient = torch.randn(9, 24, generator=generator)
    results = []
    for linear in (sequential_linear, grouped_linear):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = linear(*leaves, torch.tensor(counts))
        out.backward(gradient)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    used = torch.tensor(counts) > 0
    assert results[0][2][used].abs().sum() > 0 and results[0][2][~used].eq(0).all()


def test_parameters_are_those_of_the_published_model():
    """Qwen3-30B-A3B: 30.5 B, 3.3 B of them active (https://huggingface.co/Qwen/Qwen3-30B-A3B)."""
    arch = SHAPES["qwen3-30b-a3b"]
    assert f"{arch.num_parameters / 1e9:.1f} {arch.num_active_parameters / 1e9:.2f}" == "30.5 3.35"
    for of in (arch, EXPERTS):
        assert of.num_parameters == sum(math.prod(shape) for shape in whole_shapes(of).values())


def test_balance_is_that_of_transformers():
    """Whose function sums over a token's experts where ours takes the mean."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from megatron_mixcpt.model.routing import choices_of, routing_metrics

    arch = dataclasses.replace(EXPERTS, num_layers=2, dense_layers=(0,))
    logits = torch.randn(50, arch.num_experts, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    counts = choices_of(probabilities.topk(arch.experts_per_token)[1], arch.num_experts)
    square = logits.logsumexp(-1).square().sum()
    compared = torch.tensor([5.0, 20.0])  # choices, of which a quarter is another than the base's
    row = torch.cat([counts, probabilities.sum(0), compared, torch.stack([square, torch.tensor(50.0)])]).tolist()
    metrics = routing_metrics([[0.0] * len(row), row], arch)
    expected = load_balancing_loss_func((logits,), arch.num_experts, arch.experts_per_token)
    assert metrics["moe/balance"] == pytest.approx(float(expected) / arch.experts_per_token, rel=1e-5)
    assert metrics["moe/z"] == pytest.approx(float(square) / 50)
    assert metrics["moe/load_max/1"] == pytest.approx(float(counts.max()) / 25) and "moe/load_max/0" not in metrics
    assert metrics["moe/idle"] == 0.0 and metrics["moe/changed"] == metrics["moe/changed/1"] == 0.25


def test_choices_are_compared_with_the_bases_of_the_same_tokens():
    from megatron_mixcpt.model.base_routing import BaseRouting

    base = BaseRouting()
    base.keep(0, torch.tensor([[0, 1], [2, 3]]))
    base.keep(1, torch.tensor([[5, 4]]))
    base.keep(0, torch.tensor([[7, 6]]))
    assert base.changed(0, torch.tensor([[1, 0], [3, 1]])) == (1, 4)  # in whatever order
    assert base.changed(0, torch.tensor([[1, 0]])) == (2, 2)
    assert base.changed(0, torch.tensor([[1, 0]])) == (0, 0)  # nothing to compare with
    base.clear()
    assert base.changed(1, torch.tensor([[4, 5]])) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["gate"]}, r"gate is also of a router \(model.layers.0.mlp.gate\), which takes no adapter"),
        ({"targets": ["model.layers.1.mlp.*"]}, "is also of a router"),
        ({"targets": ["gate_proj"]}, r"and not model.layers.0.mlp.experts.0.up_proj: all of them are adapted or none"),
        ({"targets": ["q_proj", "up_proj", "gate_proj"]}, r"not model.layers.0.mlp.experts.0.down_proj"),
        ({"targets": ["model.layers.3.mlp.experts.1.*"]}, "of layer 3 and not model.layers.3.mlp.experts.0.gate_proj"),
        ({"method": "alora"}, "which ALoRA's attention takes in: set adapter.method=lora"),
    ],
)
def test_adapters_that_experts_cannot_have_are_refused_by_name(changes, message):
    arch = dataclasses.replace(EXPERTS, model_type="qwen3_moe", qk_norm=True)
    with pytest.raises(ConfigError, match=message):
        adapted_linears(arch, AdapterConfig(**{"method": "lora", "rank": 2} | changes))


def test_adapters_on_attention_alone_are_no_experts():
    arch = dataclasses.replace(EXPERTS, model_type="qwen3_moe", qk_norm=True)
    linears = adapted_linears(arch, AdapterConfig(method="lora", rank=2, targets=["q_proj", "o_proj"]))
    assert len(linears) == 2 * arch.num_layers


@pytest.mark.parametrize(
    ("arch", "expert", "message"),
    [
        (EXPERTS, 3, r"parallel.expert=3 does not divide this model's 4 experts: use one of \[1, 2, 4\]"),
        (TINY, 2, "parallel.expert=2: this model has no experts"),
    ],
)
def test_experts_that_cannot_be_spread_are_refused(arch, expert, message):
    arch.check_layout(1, 1, expert=1)
    with pytest.raises(ConfigError, match=message):
        arch.check_layout(1, 1, expert=expert)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_unshard_inverts_shard_of_spread_experts(experts):
    for name, shape in whole_shapes(EXPERTS).items():
        whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        ranks = range(experts) if is_of_experts(name) else [0]
        places = [Place(tensor, 2, expert, experts) for expert in ranks for tensor in range(2)]
        parts = [shard(name, whole, place, EXPERTS.padded_vocab_size(2)) for place in places]
        assert torch.equal(unshard(name, parts, EXPERTS.vocab_size, experts), whole), name
        assert not is_of_experts(name) or len(parts[0]) == EXPERTS.num_experts // experts


def test_experts_too_narrow_for_the_tensor_ranks_are_refused():
    with pytest.raises(ConfigError, match="FFN 48 and 20"):
        dataclasses.replace(EXPERTS, num_attention_heads=8, num_query_groups=8).check_layout(8, 1)
