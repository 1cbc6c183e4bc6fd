"""Which layers lie on which pipeline rank, what waits there, and what is refused."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixcpt.architecture.architecture import PRESETS
from megatron_mixcpt.architecture.stages import Stages, balanced, stages_of
from megatron_mixcpt.architecture.throughput import layer_weights
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.plan.schedule import idle_share, most_in_flight
from megatron_mixcpt.train.setup import check_batch

TINY = PRESETS["tiny"]
EIGHT_B = dataclasses.replace(
    TINY,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def configured(**sections):
    values = {"model": {"preset": "tiny"}, "data": {"mix": "mix"}, "train": {"steps": 1}, "run_dir": "run"}
    return validate(Config, values | sections, "test")


def burdens(arch, stages, layer_passes, head_passes):
    """FLOPs a token of each rank."""
    head = head_passes * 2 * arch.vocab_size * arch.hidden_size
    sums = [layer_passes * 2 * layer_weights(arch) * len(stages.layers_of(rank)) for rank in range(stages.pipeline)]
    sums[0] += 2 * arch.hidden_size
    sums[-1] += head
    return sums


@given(
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(0, 5),
    st.sampled_from([100, 3000, 20000]),
    st.sampled_from([(3.0, 3.0), (4.0, 6.0)]),
)
def test_no_other_cut_has_a_smaller_largest_burden(pipeline, interleave, more, vocabulary, passes):
    parts = pipeline * interleave
    arch = dataclasses.replace(TINY, num_layers=parts + more, vocab_size=vocabulary)
    found = balanced(arch, pipeline, interleave, layer_passes=passes[0], head_passes=passes[1])
    assert sum(found.layers) == arch.num_layers and min(found.layers) >= 1 and found.interleave == interleave
    largest = max(burdens(arch, found, *passes))
    for places in itertools.combinations_with_replacement(range(pipeline), more):
        other = [1] * parts
        for rank in places:
            other[rank] += 1
        assert largest <= max(burdens(arch, Stages(tuple(other), pipeline), *passes)) * (1 + 1e-12)


def test_the_head_of_a_large_model_takes_layers_from_the_last_stage():
    assert balanced(EIGHT_B, 4).layers == (8, 9, 9, 6)
    assert sum(balanced(EIGHT_B, 4, 2).layers) == 32
    teacher = configured(parallel={"pipeline": 4}, loss={"fuse_lm_head": True})
    assert stages_of(teacher, EIGHT_B).layers[-1] <= 6


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_layer_lies_on_one_rank(pipeline, interleave, data):
    counts = data.draw(st.lists(st.integers(1, 4), min_size=pipeline * interleave, max_size=pipeline * interleave))
    stages = Stages(tuple(counts), pipeline)
    owners = {layer: rank for rank in range(pipeline) for layer in stages.layers_of(rank)}
    assert sorted(owners) == list(range(sum(counts)))
    assert all(stages.owner(layer) == rank for layer, rank in owners.items())
    flat = [word for part in stages.megatron_layout() for word in part]
    assert flat == ["embedding", *["decoder"] * sum(counts), "loss"]


def test_what_waits_and_what_idles_is_what_the_schedules_say():
    plain = Stages((2, 2, 2, 2), 4)
    assert [most_in_flight(plain, rank, 8) for rank in range(4)] == [(8, 4), (6, 3), (4, 2), (2, 1)]
    assert most_in_flight(plain, 0, 2) == (4, 2)
    # arXiv 2104.04473: 2 (p - rank - 1) + (v - 1) p forward passes come before the first backward one.
    interleaved = Stages((1,) * 8, 4)
    assert [most_in_flight(interleaved, rank, 8) for rank in range(4)] == [(11, 11), (9, 9), (7, 7), (5, 5)]
    assert idle_share(4, 1, 8) == pytest.approx(3 / 11) and idle_share(4, 2, 8) == pytest.approx(3 / 19)
    assert idle_share(1, 1, 8) == 0


@pytest.mark.parametrize(
    "parallel, message",
    [
        ({"interleave": 2}, "parallel.interleave needs parallel.pipeline > 1"),
        ({"pipeline": 2, "layers_per_stage": [1, 1, 2]}, "has 3 numbers"),
        ({"pipeline": 2, "interleave": 2, "layers_per_stage": [2, 2]}, "= 4 parts"),
        ({"pipeline": 2, "layers_per_stage": [4, 0]}, "layers_per_stage"),
    ],
)
def test_parts_that_do_not_fit_the_grid_are_refused(parallel, message):
    with pytest.raises(ConfigError, match="(?s)" + message):
        configured(parallel=parallel)


@pytest.mark.parametrize(
    "parallel, message",
    [
        ({"pipeline": 2, "layers_per_stage": [1, 2]}, "adds up to 3 layers, the model has 4"),
        ({"pipeline": 2, "interleave": 3}, "parallel.interleave=3 makes 6 parts of 4 layers"),
    ],
)
def test_parts_that_do_not_fit_the_model_are_refused(parallel, message):
    with pytest.raises(ConfigError, match=message):
        stages_of(configured(parallel=parallel), TINY)


def test_micro_batches_that_the_interleaved_schedule_cannot_take_are_refused():
    parallel = {"pipeline": 2, "interleave": 2}
    check_batch(configured(parallel=parallel, train={"steps": 1, "global_batch_size": 4}), 2)
    with pytest.raises(ConfigError, match="needs a number of micro-batches that"):
        check_batch(configured(parallel=parallel, train={"steps": 1, "global_batch_size": 3}), 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"overlap_p2p_comm": False, "batch_p2p_comm": True}, "overlap_p2p_comm"),
        ({"deallocate_pipeline_outputs": True}, "deallocate_pipeline_outputs"),
    ],
)
def test_what_megatron_computes_wrongly_is_refused_by_name(changes, message):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mixcpt.model.specs import check_schedule

    sound = {"overlap_p2p_comm": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": False}
    sizes = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 1, "pipeline_model_parallel_size": 2}
    sizes |= {"virtual_pipeline_model_parallel_size": 2, "pipeline_dtype": "fp32"}
    check_schedule(TransformerConfig(**sizes, **sound))
    with pytest.raises(ConfigError, match=message):
        check_schedule(TransformerConfig(**sizes, **(sound | changes)))
