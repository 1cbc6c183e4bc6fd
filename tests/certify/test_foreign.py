"""`certify-loss` passes losses that are right, and finds known mistakes of public ones (tests/certify/losses.py)."""

import itertools
import os
from pathlib import Path

import pytest
import torch

from megatron_mixcpt.certify import foreign
from megatron_mixcpt.cli import main
from tests.helpers.spawn import run_distributed

WHERE = "tests.certify.losses"
RANKS = (1, 2, 4)
# Of each loss its formula, and whether it is right on 1 rank and on more.
LOSSES = {
    "cross_entropy": ("cross-entropy", True, True),
    "mean_cross_entropy": ("cross-entropy", True, True),
    "forward_kl": ("forward-kl", True, True),
    "reverse_kl": ("reverse-kl", True, True),
    "kl_summed_under_autograd": ("forward-kl", True, False),
    "label_summed_outside_autograd": ("cross-entropy", True, False),
    "gathered_logits_taken_for_a_shard": ("cross-entropy", True, False),
    "softmax_of_each_shard": ("forward-kl", True, False),
    "broken": ("cross-entropy", False, False),
}


def call_all(rank, world_size, folder):
    """What each rank of `certify-loss` does, for all losses in one start."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name, (formula, *_) in LOSSES.items():
        torch.save(foreign.called(f"{WHERE}:{name}", formula, dist.group.WORLD), Path(folder) / f"{name}-{rank}.pt")
        dist.barrier()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    found = {}
    for ranks in RANKS:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        run_distributed(call_all, ranks, str(folder))
        for name, (formula, *_) in LOSSES.items():
            results = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]
            found[name, ranks] = foreign.judge(formula, results)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "ranks"), itertools.product(LOSSES, RANKS))
def test_losses_are_right_where_they_are_and_wrong_where_they_are_not(verdicts, name, ranks):
    verdict = verdicts[name, ranks]
    _, alone, together = LOSSES[name]
    assert verdict.is_off != (alone if ranks == 1 else together), verdict.told()


@pytest.mark.distributed
def test_what_is_wrong_is_said(verdicts):
    doubled = verdicts["kl_summed_under_autograd", 2]
    assert doubled.value <= doubled.bounds[0]  # which is why nobody sees it in a log
    assert "2 times the right gradient, the group's size" in doubled.told()
    partial = verdicts["label_summed_outside_autograd", 2]
    assert partial.value <= partial.bounds[0] and partial.gradient > 0.1
    assert verdicts["gathered_logits_taken_for_a_shard", 2].value > 0.01
    assert "no such layout" in verdicts["broken", 2].told()


@pytest.mark.distributed
def test_the_command_starts_the_ranks_itself(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    name = f"{WHERE}:kl_summed_under_autograd"
    assert main(["certify-loss", name, "--formula", "forward-kl", "--nproc", "2"]) == 3
    out, err = capsys.readouterr()
    assert "1 rank: value within" in out and "2 ranks: value within" in out and "off by 1" in out
    assert "is not forward-kl" in err


@pytest.mark.distributed
def test_where_one_rank_fails_its_reason_is_told_and_not_what_the_others_saw(capfd, monkeypatch, tmp_path):
    (tmp_path / "one_of_two.py").write_text(
        "import torch.distributed as dist\n"
        "def loss(logits, labels, group):\n"
        "    if dist.get_rank(group) == 1:\n"
        "        raise ValueError('not this one')\n"
        "    dist.all_reduce(logits.detach().clone(), group=group)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["certify-loss", "one_of_two:loss", "--nproc", "2"]) == 3
    assert "2 ranks: ValueError: not this one" in capfd.readouterr().out


def test_without_a_rank_nothing_is_certified(capsys):
    assert main(["certify-loss", f"{WHERE}:cross_entropy", "--nproc", "0"]) == 2
    assert "--nproc 0" in capsys.readouterr().err


def test_a_module_that_cannot_be_imported_is_named_with_its_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "ill.py").write_text("def loss(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["certify-loss", "ill:loss"]) == 2
    assert "ill:loss: SyntaxError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no.such.module:loss", f"{WHERE}:none", "words"])
def test_a_loss_that_is_not_there_is_a_mistake_of_the_command_line(name, capsys):
    assert main(["certify-loss", name]) == 2
    assert "package.module:function" in capsys.readouterr().err
