"""Adapters on one process: what they compute, what they see, what is trained."""

import itertools

import pytest
import torch

from megatron_mixcpt.adapters.layout import adapted_linears, check_adapter_layout, num_parameters
from megatron_mixcpt.architecture.stages import Stages
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.model.adapter_models import METHODS, adapted_output, build, random_tensors
from tests.model.grid import TIED, TINY, microbatch

ARCHITECTURES = {"untied": TINY, "tied": TIED}


@pytest.fixture(scope="module", autouse=True)
def grid():
    with parallel_context():
        yield


def packed(arch, index=1):
    from megatron_mixcpt.attention.documents import Documents

    tokens, labels, doc_start = microbatch(arch, index)
    packing = Documents.of(doc_start)
    return tokens, labels, doc_start, packing.position_ids(), packing


def losses(model, tokens, labels, doc_start, position_ids, packing):
    return model(tokens, position_ids, packing, labels=labels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_adapter_is_the_base_model_bit_for_bit(name, method, dtype):
    arch = ARCHITECTURES[name]
    base, adapted = build(arch, params_dtype=dtype), build(arch, METHODS[method], params_dtype=dtype)
    batch = packed(arch)
    assert torch.equal(losses(base, *batch), losses(adapted, *batch))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_computes_what_fp64_token_by_token_does(name, method):
    arch, adapter = ARCHITECTURES[name], METHODS[method]
    tensors = random_tensors(arch, adapter)
    model = build(arch, adapter, tensors)
    tokens, labels, doc_start, position_ids, packing = packed(arch)
    seen = []

    def keep(module, args, output):
        seen.append((module, args[0].detach(), output[0].detach()))

    linears = {linear.linear: linear for linear in adapted_linears(arch, adapter)}
    for path in linears:
        model.get_submodule(path).register_forward_hook(keep)
    losses(model, tokens, labels, doc_start, position_ids, packing)
    assert len(seen) == len(linears)
    for module, x, output in seen:
        layout = module.adapter.layout
        bias = 0 if module.bias is None else module.bias
        for row in range(tokens.shape[0]):
            expected = adapted_output(layout, tensors, module.weight, x[:, row], doc_start[row]) + bias
            torch.testing.assert_close(output[:, row].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "alora"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "attention", "full"])
def test_gradient_reaches_all_adapters_and_nothing_else(method, recompute):
    tensors = random_tensors(TINY, METHODS[method])
    model = build(TINY, METHODS[method], tensors, recompute=recompute)
    losses(model, *packed(TINY)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".adapter." in name}
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in trained)
    assert sum(model.get_parameter(name).numel() for name in trained) == num_parameters(TINY, METHODS[method])
    if recompute != "none":
        plain = build(TINY, METHODS[method], tensors)
        losses(plain, *packed(TINY)).sum().backward()
        for name in trained:
            torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("method", ["lora", "alora", "alora without residual"])
def test_a_token_changes_nothing_before_it_and_nothing_in_other_documents(method):
    from megatron_mixcpt.attention.documents import Documents

    model = build(TINY, METHODS[method], random_tensors(TINY, METHODS[method]))
    tokens, _, doc_start, position_ids, packing = packed(TINY)
    start = int(doc_start[0].nonzero()[-1])  # of the last document of row 0
    before = model(tokens, position_ids, packing)
    for changed in (start - 1, start + 3):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % TINY.vocab_size
        after = model(other, position_ids, packing)
        different = (after != before).any(dim=-1)  # [b, s]
        assert different[0, changed] and not different[1].any()
        assert not different[0, :changed].any()
        assert not different[0, start:].any() or changed >= start
    # In a single document the earlier ones are seen.
    whole = Documents.whole(*tokens.shape)
    assert not (model(tokens, position_ids, whole) == before).all()


def test_alora_takes_in_preceding_tokens_where_lora_does_not():
    from megatron_mixcpt.attention.documents import Documents

    """The adapter alone: its output at the last token, when the first changes."""
    for method, expected in (("lora", False), ("alora", True)):
        model = build(TINY, METHODS[method], random_tensors(TINY, METHODS[method]))
        adapter = model.adapters()[0]
        adapter.packing = Documents.whole(1, 5)
        x = torch.randn(5, 1, TINY.hidden_size)
        other = x.clone()
        other[0] += 1.0
        assert (not torch.equal(adapter(x)[-1], adapter(other)[-1])) == expected


def test_what_a_packed_document_gives_is_what_it_gives_alone():
    from megatron_mixcpt.attention.documents import Documents

    adapter = METHODS["alora"]
    model = build(TINY, adapter, random_tensors(TINY, adapter))
    tokens, _, doc_start, position_ids, packing = packed(TINY)
    whole = model(tokens, position_ids, packing)
    starts = [*doc_start[0].nonzero().flatten().tolist(), tokens.shape[1]]
    for begin, end in itertools.pairwise(starts):
        alone = model(tokens[:1, begin:end], torch.arange(end - begin)[None], Documents.whole(1, end - begin))
        torch.testing.assert_close(alone[0], whole[0, begin:end], rtol=1e-4, atol=1e-4)


def test_switched_off_the_model_is_the_base_and_on_again_what_it_was():
    from megatron_mixcpt.adapters.layers import adapters_off

    adapter = METHODS["alora"]
    base, model = build(TINY), build(TINY, adapter, random_tensors(TINY, adapter))
    batch = packed(TINY)
    before = losses(model, *batch)
    with adapters_off(model):
        assert torch.equal(losses(model, *batch), losses(base, *batch))
    assert torch.equal(losses(model, *batch), before)
    assert not torch.equal(before, losses(base, *batch))


def test_lora_merged_into_the_weights_is_the_same_model():
    from megatron_mixcpt.adapters.files import whole_delta

    for arch in (TINY, TIED):
        for method in ("lora", "lora on some"):
            tensors = random_tensors(arch, METHODS[method])
            model, merged = build(arch, METHODS[method], tensors), build(arch)
            for linear in adapted_linears(arch, METHODS[method]):
                merged.get_submodule(linear.linear).weight.data += whole_delta(linear, tensors)
            batch = packed(arch)
            torch.testing.assert_close(losses(model, *batch), losses(merged, *batch), rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_alone():
    adapter = METHODS["lora"].model_copy(update={"dropout": 0.5})
    tensors = random_tensors(TINY, adapter)
    model, without = build(TINY, adapter, tensors), build(TINY, METHODS["lora"], tensors)
    batch = packed(TINY)
    assert not torch.equal(losses(model, *batch), losses(model, *batch))
    assert torch.equal(losses(model.eval(), *batch), losses(without, *batch))
    x = torch.randn(4, 2, TINY.hidden_size)
    module, plain = model.train().adapters()[0], without.adapters()[0]
    mean = torch.stack([module(x) for _ in range(3000)]).mean(0)
    assert (mean - plain(x)).abs().max() < 0.1 * plain(x).abs().max()  # its expectation is what it is without


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": ["query"]}, "query matches no layer"),
        ({"targets": ["*_proj", "lm_head"]}, "lm_head matches no layer"),
        ({"targets": ["model.layers.0.*"]}, "pipeline stage 1 (layers 2 to 3) nothing to train"),
        ({"targets": ["q_proj", "v_proj"]}, "all of q_proj, k_proj and v_proj"),
    ],
)
def test_targets_that_cannot_work_are_refused(changes, message):
    adapter = METHODS["lora"].model_copy(update=changes)
    with pytest.raises(ConfigError) as refusal:
        check_adapter_layout(TINY, adapter, 6, Stages((2, 2), pipeline=2))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"method": "lora", "heads": 4}, "adapter.method alora"),
        ({"method": "alora", "rank": 18}, "must divide adapter.rank (18)"),
        ({"method": "ia3"}, "lora"),
        ({"method": "lora", "rnk": 8}, "did you mean adapter.rank?"),
    ],
)
def test_wrong_settings_name_the_key(values, message):
    from megatron_mixcpt.config import Config, validate

    whole = {"model": {"preset": "tiny"}, "data": {"mix": "x"}, "train": {"steps": 1}, "run_dir": "r"}
    with pytest.raises(ConfigError) as refusal:
        validate(Config, whole | {"adapter": values}, "test")
    assert message in str(refusal.value)


def test_adapter_off_needs_an_adapter():
    from megatron_mixcpt.config import Config, validate

    whole = {"model": {"preset": "tiny"}, "data": {"mix": "x"}, "train": {"steps": 1}, "run_dir": "r"}
    with pytest.raises(ConfigError, match="needs an adapter section"):
        validate(Config, whole | {"teacher": {"source": "adapter_off"}}, "test")
    validate(Config, whole | {"teacher": {"source": "adapter_off"}, "adapter": {"method": "lora"}}, "test")


def test_heads_follow_the_rank():
    assert AdapterConfig(method="alora", rank=16).num_heads == 4
    assert AdapterConfig(method="alora", rank=10).num_heads == 1
