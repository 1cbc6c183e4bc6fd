"""Every process grid computes the losses and gradients of one process."""

import pytest
import torch

from tests.helpers.spawn import run_distributed
from tests.model.grid import EXPERTS, TIED, TINY, UNLIKE_LLAMA, step, steps, whole_gradients

TWO = {
    "tensor": {"tensor": 2},
    "sequence": {"tensor": 2, "sequence": True},
    "sequence-recompute": {"tensor": 2, "sequence": True, "recompute": "full"},
    "pipeline": {"pipeline": 2},
    "uneven-pipeline": {"pipeline": 2, "layers": (1, 3)},
    "interleaved": {"pipeline": 2, "interleave": 2},
    "interleaved-recompute": {"pipeline": 2, "interleave": 2, "recompute": "mlp"},
    "recompute-mlp": {"tensor": 2, "sequence": True, "recompute": "mlp"},
    "recompute-attention": {"tensor": 2, "sequence": True, "recompute": "attention"},
    "context-recompute-attention": {"context": 2, "recompute": "attention"},
    "data": {},
    "context": {"context": 2},
    "context-recompute": {"context": 2, "recompute": "full"},
    "data-overlap": {"overlap": True},
}
FOUR = {
    "tensor-pipeline": {"tensor": 2, "pipeline": 2},
    "sequence-pipeline-recompute": {"tensor": 2, "pipeline": 2, "sequence": True, "recompute": "full"},
    "pipeline-data": {"pipeline": 2},
    "interleaved-tensor": {"pipeline": 2, "interleave": 2, "tensor": 2, "sequence": True},
    "interleaved-context": {"pipeline": 2, "interleave": 2, "context": 2},
    "interleaved-data": {"pipeline": 2, "interleave": 2, "overlap": True},
    "tensor-context": {"tensor": 2, "context": 2, "sequence": True},
    "pipeline-context": {"pipeline": 2, "context": 2},
    "context-data": {"context": 2, "overlap": True},
    "context-4": {"context": 4},
    "tensor-data": {"tensor": 2, "sequence": True},
}
ARCHITECTURES = {"grouped": TINY, "tied-multi-query": TIED, "unlike-llama": UNLIKE_LLAMA, "experts": EXPERTS}
# Of these architectures those that their features can make a difference in.
CHOSEN = {
    "unlike-llama": (
        "sequence",
        "sequence-recompute",
        "uneven-pipeline",
        "recompute-attention",
        "context",
        "tensor-pipeline",
    ),
    "experts": (
        "tensor",
        "sequence",
        "uneven-pipeline",
        "interleaved",
        "recompute-mlp",
        "context",
        "data-overlap",
        "tensor-pipeline",
    ),
}


def cases_of(layouts):
    """(architecture, layout)."""
    return [(key, name) for key in ARCHITECTURES for name in layouts if name in CHOSEN.get(key, layouts)]


@pytest.fixture(scope="module")
def reference():
    return {key: step(arch) for key, arch in ARCHITECTURES.items()}


def run(world_size, layouts):
    cases = {(key, name): (ARCHITECTURES[key], layouts[name]) for key, name in cases_of(layouts)}
    results = run_distributed(steps, world_size, list(cases.values()))
    return {case: [rank[i] for rank in results] for i, case in enumerate(cases)}


@pytest.fixture(scope="module")
def two():
    return run(2, TWO)


@pytest.fixture(scope="module")
def four():
    return run(4, FOUR)


def check(arch, reference, ranks, copies):
    loss = sum(loss for loss, _ in ranks) / copies
    assert loss == pytest.approx(reference[0], rel=1e-6)
    expected = whole_gradients(arch, [reference])
    actual = whole_gradients(arch, ranks)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, f"{name} gets no gradient: the comparison would be empty"
        torch.testing.assert_close(actual[name], grad, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.distributed
@pytest.mark.parametrize("key, layout", cases_of(TWO))
def test_two_processes_equal_one(reference, two, key, layout):
    copies = TWO[layout].get("tensor", 1)  # every tensor rank reports the same loss
    check(ARCHITECTURES[key], reference[key], two[key, layout], copies)


@pytest.mark.distributed
@pytest.mark.parametrize("key, layout", cases_of(FOUR))
def test_four_processes_equal_one(reference, four, key, layout):
    copies = FOUR[layout].get("tensor", 1)
    check(ARCHITECTURES[key], reference[key], four[key, layout], copies)
