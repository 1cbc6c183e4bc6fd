"""The optimizer in host memory against the resident one: steps, clipping, skipped steps, checkpoints both ways."""

import os
import shutil

import numpy as np
import pytest
import torch

from megatron_mixcpt.checkpoint import list_checkpoints
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.plan.estimate import make_plan
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.train import host_adam, optimizer
from megatron_mixcpt.train.loop import train
from megatron_mixcpt.train.setup import build, read_model_and_mix
from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.train.runs import losses, run_steps, settings

pytestmark = pytest.mark.slow

OFFLOAD = {"optimizer": {"offload": "cpu"}}
KINDS = {
    "fp32": {},
    "bf16": {"train": {"dtype": "bf16"}},
    "distributed": {"train": {"distributed_optimizer": True}},
    "bf16 distributed": {"train": {"dtype": "bf16", "distributed_optimizer": True}},
}
# Both are AdamW in fp32; they differ by the rounding of a fused multiply-add. bf16 weights then differ by at most one
# rounding of their own where a master lies near the middle of two of them.
TOLERANCE = {"fp32": 2e-6, "distributed": 2e-6, "bf16": 2e-3, "bf16 distributed": 2e-3}


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("host") / "data")


class _AsOnADevice:
    """Host and parameters as two memories, as on a GPU, though both are this machine's."""

    def __enter__(self):
        self._plain = host_adam.offload
        host_adam.offload = lambda optimizer, model: self._plain(optimizer, model, copies=True)

    def __exit__(self, *error):
        host_adam.offload = self._plain


def _compare(rank, world_size, mix, folder):
    results = {}
    for kind, sections in KINDS.items():
        for name, extra in {"resident": {}, "one memory": OFFLOAD, "two memories": OFFLOAD}.items():
            os.environ["MASTER_PORT"] = str(free_port()) if world_size == 1 else os.environ["MASTER_PORT"]
            values = settings(mix, folder / kind / name, **{"train": {}} | sections | extra)
            values["train"] |= {"clip_grad": 0.05, "steps": 5}
            if name == "two memories":
                with _AsOnADevice():
                    results[kind, name] = run_steps(values)
            else:
                results[kind, name] = run_steps(values)
    return results


@pytest.fixture(scope="module")
def compared(mix, tmp_path_factory):
    return run_distributed(_compare, 2, mix, tmp_path_factory.mktemp("compared"), timeout=500)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["one memory", "two memories"])
def test_the_steps_are_those_of_the_resident_optimizer(compared, kind, name):
    expected, found = compared[kind, "resident"], compared[kind, name]
    assert min(expected["norms"]) > 0.05, "clipping has something to do"
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=TOLERANCE[kind])
    for key, weight in expected["weights"].items():
        scale = max(np.abs(weight).max(), 1.0)
        np.testing.assert_allclose(found["weights"][key], weight, atol=4 * TOLERANCE[kind] * scale, rtol=0, err_msg=key)
    if name == "two memories":
        assert found["losses"] == compared[kind, "one memory"]["losses"], "moving the numbers does not change them"


def test_a_skipped_step_changes_nothing_and_masters_are_empty_on_the_device(mix, tmp_path):
    config = validate(Config, settings(mix, tmp_path / "run", train={"dtype": "bf16"}, **OFFLOAD), "test")
    with _AsOnADevice(), parallel_context() as state:
        components = build(config, state)
        inner = components.optimizer.optimizer if hasattr(components.optimizer, "optimizer") else None
        inner = inner or components.optimizer.chained_optimizers[0].optimizer
        masters = [p for group in inner.param_groups for p in group["params"] if p.dtype == torch.float32]
        shells = [p for p in masters if p.numel() > 1]
        assert shells and all(p.untyped_storage().nbytes() <= 4 for p in shells)
        before = [inner.master(p).clone() for p in masters]
        for parameter in components.model.parameters():
            parameter.main_grad.fill_(1.0)
        optimizer.optimizer_step(components.optimizer, 0, config.train, admits=lambda norm: False)
        assert all(torch.equal(a, inner.master(p)) for a, p in zip(before, masters))
        optimizer.optimizer_step(components.optimizer, 0, config.train)
        assert not any(torch.equal(a, inner.master(p)) for a, p in zip(before, masters) if a.numel() > 1)


def _resume(rank, world_size, runs):
    for port, values, two_memories in runs:
        os.environ["MASTER_PORT"] = str(port)
        if two_memories:
            with _AsOnADevice():
                train(validate(Config, values, "test"))
        else:
            train(validate(Config, values, "test"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpoints_are_interchangeable_both_ways(mix, tmp_path, dtype):
    """Four steps straight on, against two steps of one kind and two of the other."""

    def values(name, extra):
        return settings(mix, tmp_path / name, train={"dtype": dtype}, checkpoint={"every": 2, "keep": 5}, **extra)

    first = [(free_port(), values("resident", {}), False), (free_port(), values("offloaded", OFFLOAD), True)]
    run_distributed(_resume, 1, first)
    second = []
    for name, source, extra in (("to host", "resident", OFFLOAD), ("from host", "offloaded", {})):
        shutil.copytree(tmp_path / source / "checkpoints", tmp_path / name / "checkpoints")
        for checkpoint in list_checkpoints(tmp_path / name / "checkpoints"):
            if checkpoint.name != "step_00000002":
                shutil.rmtree(checkpoint)
        second.append((free_port(), values(name, extra), bool(extra)))
    run_distributed(_resume, 1, second)
    expected = losses(tmp_path / "resident")
    for name in ("offloaded", "to host", "from host"):
        found = losses(tmp_path / name)
        steps = sorted(found)[-2:]
        assert steps == [3, 4]
        np.testing.assert_allclose([found[s] for s in steps], [expected[s] for s in steps], rtol=TOLERANCE[dtype])


def test_the_plan_shows_what_leaves_the_device(mix, tmp_path):
    plans = []
    for extra in ({}, OFFLOAD):
        config = validate(Config, settings(mix, tmp_path / "run", train={"dtype": "bf16"}, **extra), "test")
        plans.append(make_plan(config, *read_model_and_mix(config), world_size=1).stages[0])
    assert plans[0].optimizer == 12 * plans[0].num_parameters
    assert plans[1].offloaded == 16 * plans[0].num_parameters  # and the gradients of a step
    assert plans[1].optimizer == plans[0].offloaded == 0
    assert plans[0].total - plans[1].total == plans[0].optimizer


@pytest.mark.parametrize("kind", ["bf16", "bf16 distributed"])
def test_weights_that_are_put_into_the_model_reach_the_masters_on_the_host(mix, tmp_path, kind):
    """As `mixcpt certify` puts them there."""
    values = settings(mix, tmp_path / "run", **{"train": {}} | KINDS[kind] | OFFLOAD)
    with parallel_context() as state, _AsOnADevice():
        components = build(validate(Config, values, "test"), state)
        with torch.no_grad():
            for parameter in components.model.parameters():
                parameter.add_(0.25)
        components.optimizer.reload_model_params()
        masters = [
            (adam, master)
            for adam in (single.optimizer for single in host_adam.singles(components.optimizer))
            for group in adam.param_groups
            for master in group["params"]
        ]
        assert sum(adam.master(p).sum().item() for adam, p in masters) == pytest.approx(
            sum(p.float().sum().item() for p in components.model.parameters()), rel=1e-4
        )
