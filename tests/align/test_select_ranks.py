"""Ranks of `mixcpt select` end together: however rank 0 ends the work that it does alone, and on a stop of any rank."""

import os
import signal

import pytest

from megatron_mixcpt.config import validate
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.select import score, select
from megatron_mixcpt.select.config import SelectConfig
from tests.align.runs import select_values
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def one_select(rank, case, run):
    """What one rank met, and whether the result was there when it ended."""
    finish, share, shares = select.finish, score._share, []

    def finishing(*arguments):
        if case == "mistake":
            raise ConfigError("rank 0's mistake")
        if case == "bug":
            raise ZeroDivisionError
        if case == "stop of rank 0":
            stop()
        finish(*arguments)

    def sharing(*arguments):
        shares.append(None)
        if case == "stop of rank 1" and rank == 1 and len(shares) == 1:
            stop()
        return share(*arguments)

    config = validate(SelectConfig, run, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "finish", finishing)
        patch.setattr(score, "_share", sharing)
        try:
            select.select(config)
            met = None
        except Exception as error:
            met = (type(error).__name__, getattr(error, "exit_code", None), str(error))
    return {"met": met, "done": os.path.exists(config.out + "/report.md"), "rounds": len(shares)}


def all_cases(rank, world_size, runs):
    found = {}
    for case, (port, run) in runs.items():
        os.environ["MASTER_PORT"] = str(port)
        found[case] = one_select(rank, case, run)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, stage1):
    run = select_values(stage1, {"preset": "tiny"}, tmp_path_factory.mktemp("ranks") / "out", micro_batch_tokens=64)
    cases = ("stop of rank 1", "mistake", "bug", "stop of rank 0", "none")
    return run_distributed(all_cases, 2, {case: (free_port(), run) for case in cases}, timeout=300)


@pytest.mark.distributed
def test_a_stop_that_reaches_one_rank_stops_all_after_the_round_and_keeps_it(ranks):
    for rank in ranks:
        assert rank["stop of rank 1"]["met"][1] == 75 and "scores are kept" in rank["stop of rank 1"]["met"][2]
        assert rank["stop of rank 1"]["rounds"] == 1 < rank["mistake"]["rounds"]
        assert rank["none"]["rounds"] == 0  # all scores are there


@pytest.mark.distributed
def test_how_rank_0_failed_alone_ends_all_ranks(ranks):
    for rank in ranks:
        assert rank["mistake"]["met"] == ("ConfigError", 2, "rank 0's mistake")
        assert rank["stop of rank 0"]["met"][1] == 75
        assert not rank["mistake"]["done"] and not rank["bug"]["done"] and not rank["stop of rank 0"]["done"]
    assert ranks[0]["bug"]["met"][0] == "ZeroDivisionError"
    assert ranks[1]["bug"]["met"][:2] == ("LostRankError", 1)


@pytest.mark.distributed
def test_no_rank_ends_before_the_result_is_written(ranks):
    assert [rank["none"]["met"] for rank in ranks] == [None, None]
    assert [rank["none"]["done"] for rank in ranks] == [True, True]
