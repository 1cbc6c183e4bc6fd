"""NaN on one rank, an infinite gradient, a spike: no weight changes, on any rank, and the run goes on."""

import numpy as np
import pytest
import torch

from megatron_mixcpt.checkpoint.info import read_info
from megatron_mixcpt.checkpoint.store import list_checkpoints
from megatron_mixcpt.config import TrainConfig
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.train.guard import StepGuard
from tests.faults.conftest import STEPS, run_settings
from tests.faults.fleet import finish, metrics, write_config
from tests.train.runs import saved_tensors

pytestmark = pytest.mark.slow


def spoil(changes):
    """`{step: kind}` (from 0): spoil the loss or the gradients of this rank before the optimizer sees them."""
    from megatron_mixcpt.objectives.step import ForwardBackward
    from megatron_mixcpt.train import loop

    original, step = ForwardBackward.__call__, -2  # the dry run comes first

    def wrapped(self, batches, *, forward_only=False):
        nonlocal step
        totals = original(self, batches, forward_only=forward_only)
        if forward_only:
            return totals
        step += 1
        kind = changes.get(step)
        if kind == "nan loss":
            totals[0, 1] = float("nan")
        elif kind == "inf gradient":
            next(iter(self.model.parameters())).main_grad.view(-1)[0] = float("inf")
        elif kind == "spike":
            for parameter in self.model.parameters():
                parameter.main_grad.mul_(10.0)
        return totals

    ForwardBackward.__call__ = wrapped
    assert loop.train  # the loop calls the class, so it sees the change


def weights(run, step):
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    return saved_tensors(checkpoint)


@pytest.mark.parametrize("kind", ["nan loss", "inf gradient", "spike"])
def test_a_bad_step_on_one_rank_changes_no_weight_anywhere(tmp_path, mix, kind, record):
    run = tmp_path / "run"
    train = {"spike_window": 4, "spike_sigmas": 6.0} if kind == "spike" else {}
    config = write_config(tmp_path / "train.yaml", run_settings(mix, run, train=train, checkpoint={"keep": STEPS}))
    output = finish(
        config, ranks=2, faults={1: (spoil, {6: kind}), **({0: (spoil, {6: kind})} if kind == "spike" else {})}
    )
    assert output.count("skipped, its") == 1 and "step 7: skipped" in output
    assert metrics(run, "optim/skipped")[STEPS] == 1
    before, after, later = weights(run, 6), weights(run, 7), weights(run, 8)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(after[key], later[key]) for key in after)
    assert all(torch.isfinite(tensor).all() for tensor in later.values())
    guard = read_info(list_checkpoints(run / "checkpoints")[0]).training.guard
    assert guard["skipped"] == 1 and np.isfinite(guard["losses"] + guard["norms"]).all()
    record(f"{kind} in one step, 2 ranks", "no weight changes, counted, the run goes on", "1/1")


def test_bad_steps_in_a_row_end_the_run_with_the_checkpoint_intact(tmp_path, mix):
    run = tmp_path / "run"
    config = write_config(tmp_path / "train.yaml", run_settings(mix, run, train={"max_skipped": 3}))
    output = finish(config, faults={0: (spoil, dict.fromkeys(range(4, 12), "nan loss"))}, code=1)
    assert "step 7: 3 steps in a row were skipped" in output and "Traceback" not in output
    # The last saved counts two in a row: resumed, the third ends it again.
    output = finish(config, faults={0: (spoil, {0: "nan loss"})}, code=1)
    assert "3 steps in a row were skipped" in output
    finish(config)
    losses = metrics(run, "train/loss")
    assert sorted(losses) == list(range(1, STEPS + 1)) and [step for step in losses if losses[step] is None] == [5, 6]


def guard(state=None, **settings):
    return StepGuard(TrainConfig(steps=1000, spike_window=8, max_skipped=3, **settings), state)


def test_only_what_rises_far_above_the_window_is_a_spike():
    watch = guard()
    for value in (2.0, 2.2, 1.9, 2.1, 2.0, 2.3, 1.8, 2.0):
        assert watch.admits(value, 1.0)
    assert watch.admits(0.1, 0.1)  # falling is no spike
    assert not watch.admits(20.0, 1.0) and "loss 20 is a spike" in watch.reason
    assert not watch.admits(2.0, 10.0) and "gradient norm 10 is a spike" in watch.reason
    assert watch.admits(2.0, 1.0) and watch.in_a_row == 0 and watch.skipped == 2


def test_the_window_is_not_poisoned_and_survives_a_restart():
    watch = guard()
    for _ in range(8):
        watch.admits(2.0, 1.0)
    assert not watch.admits(float("nan"), 1.0) and not watch.admits(2.0, float("inf")) and not watch.admits(99.0, 1.0)
    with pytest.raises(MixcptError, match="3 steps in a row were skipped"):
        watch.check(11)
    again = guard(watch.state())
    assert again.state() == watch.state() and not again.admits(99.0, 1.0)
    again.forget()
    assert again.admits(99.0, 1.0)


def test_without_sigmas_only_what_is_not_finite_is_skipped():
    watch = guard(spike_sigmas=0.0)
    assert all(watch.admits(2.0, 1.0) for _ in range(8)) and watch.admits(200.0, 100.0)
    assert not watch.admits(float("inf"), 1.0)
