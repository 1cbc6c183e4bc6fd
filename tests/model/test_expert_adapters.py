"""LoRA on experts in one process: what is computed, what is trained, and how it is merged."""

import dataclasses
import math

import pytest
import torch

from megatron_mixcpt.adapters.files import whole_delta
from megatron_mixcpt.adapters.layout import adapted_linears, num_parameters
from megatron_mixcpt.architecture.layout import Place, whole_shapes
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.model.adapter_models import build, fill, random_tensors
from tests.model.grid import EXPERTS, microbatch

ARCH = dataclasses.replace(EXPERTS, model_type="qwen3_moe", qk_norm=True)
LORA = AdapterConfig(method="lora", rank=6, alpha=9.0)
TENSORS = random_tensors(ARCH, LORA)


@pytest.fixture(scope="module", autouse=True)
def grid():
    with parallel_context():
        yield


def losses(model):
    from megatron_mixcpt.attention.documents import Documents

    tokens, labels, doc_start = microbatch(ARCH, 1)
    packing = Documents.of(doc_start)
    return model(tokens, packing.position_ids(), packing, labels=labels)


def test_every_expert_computes_what_fp64_row_by_row_does():
    model = build(ARCH, LORA, TENSORS)
    seen = {}

    def keep(module, args, output):
        seen[module.adapter.layout.linear] = module, *args, output.detach()

    linears = {linear.linear: linear for linear in adapted_linears(ARCH, LORA) if linear.experts}
    for path in linears:
        model.get_submodule(path).register_forward_hook(keep)
    losses(model)
    assert seen.keys() == linears.keys() and len(seen) == 2 * ARCH.num_expert_layers
    for path, (module, x, counts, output) in seen.items():
        owner = torch.arange(ARCH.num_experts).repeat_interleave(counts)
        down, up = (TENSORS[linears[path].key(name)].double() for name in ("down", "up"))
        gated = path.endswith("fc1")
        for row, expert in enumerate(owner):
            of_row = x[row].double()
            expected = module.weight[expert].double() @ of_row
            z = down[expert] @ of_row * LORA.alpha / LORA.rank
            if gated:
                expected += torch.cat([up[expert, half] @ z[6 * half : 6 * half + 6] for half in (0, 1)])
            else:
                expected += up[expert] @ z
            torch.testing.assert_close(output[row].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_gradient_reaches_all_adapters_and_nothing_else(recompute):
    model = build(ARCH, LORA, TENSORS, recompute=recompute)
    losses(model).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained.keys() == {name for name, _ in model.named_parameters() if ".adapter." in name}
    assert sum(parameter.numel() for parameter in trained.values()) == num_parameters(ARCH, LORA)
    assert all(parameter.grad.flatten(1).abs().amax(1).gt(0).any() for parameter in trained.values())
    plain = build(ARCH, LORA, TENSORS)
    losses(plain).sum().backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


def test_fresh_or_switched_off_they_are_the_base_model_bit_for_bit():
    from megatron_mixcpt.adapters.layers import adapters_off

    base, model = losses(build(ARCH)), build(ARCH, LORA, TENSORS)
    assert torch.equal(losses(build(ARCH, LORA)), base)
    before = losses(model)
    with adapters_off(model):
        assert torch.equal(losses(model), base)
    assert torch.equal(losses(model), before) and not torch.equal(before, base)


def test_merged_into_the_weights_they_are_the_same_model():
    model, merged = build(ARCH, LORA, TENSORS), build(ARCH)
    for linear in adapted_linears(ARCH, LORA):
        merged.get_submodule(linear.linear).weight.data += whole_delta(linear, TENSORS)
    torch.testing.assert_close(losses(model), losses(merged), rtol=1e-4, atol=1e-4)


def test_one_kernel_computes_what_one_product_an_expert_does():
    from megatron_mixcpt.model.experts import grouped_linear, sequential_linear

    adapter_config = LORA.model_copy(update={"rank": 8})
    arch = dataclasses.replace(ARCH, expert_ffn_size=24)
    model = build_of(arch, adapter_config)
    counts = torch.tensor([3, 0, 5, 1])
    for adapter in (adapter for adapter in model.adapters() if adapter.layout.experts):
        x = torch.randn(9, adapter.layout.in_features, requires_grad=True)
        results = []
        for product in (sequential_linear, grouped_linear):
            output = adapter(x, counts, product)
            gradients = torch.autograd.grad(output.square().sum(), [x, adapter.down, adapter.up])
            results.append([output, *gradients])
        for one, other in zip(*results):
            assert one.abs().max() > 0
            torch.testing.assert_close(one, other)


def test_the_gradient_of_an_expert_without_a_token_is_zero_whatever_the_kernel_left_there():
    from megatron_mixcpt.model.experts import ZeroIdle

    weight = torch.randn(3, 4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        ZeroIdle.apply(weight, torch.tensor([2, 0, 1])), weight, torch.full((3, 4, 2), math.nan)
    )
    assert (gradient[1] == 0).all() and gradient[[0, 2]].isnan().all()


def build_of(arch, adapter):
    from megatron_mixcpt.model.build import build_gpt

    model = build_gpt(arch, adapter=adapter)
    fill(model, random_tensors(arch, adapter))
    return model


def test_dropout_acts_in_training_alone():
    dropping = build(ARCH, LORA.model_copy(update={"dropout": 0.5}), TENSORS)
    assert not torch.equal(losses(dropping), losses(dropping))
    assert torch.equal(losses(dropping.eval()), losses(build(ARCH, LORA, TENSORS)))


def test_ranks_parts_make_up_the_whole():
    for linear in (linear for linear in adapted_linears(ARCH, LORA) if linear.experts):
        assert linear.experts == whole_shapes(ARCH)[f"{linear.linear}.weight"][0]
        for name, (shape, axis) in linear.tensors().items():
            whole = TENSORS[linear.key(name)]
            assert whole.shape == shape
            parts = {}
            for expert in range(4):
                for tensor in range(2):
                    place = Place(tensor, 2, expert, 4)
                    parts[expert, tensor] = linear.shard(name, whole, place)
                    assert parts[expert, tensor].shape == linear.local_shape(name, place)
            of_each = [
                parts[expert, 0] if axis is None else torch.cat([parts[expert, tensor] for tensor in range(2)], axis)
                for expert in range(4)
            ]
            assert torch.equal(torch.cat(of_each), whole)
