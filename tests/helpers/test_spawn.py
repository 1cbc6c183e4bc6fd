"""The spawn helper itself: a failing or hanging rank fails the test, and says where it stood."""

import time

import pytest

from tests.helpers.spawn import run_distributed


def _answer(rank, world_size, question):
    return question, rank, world_size


def _broken_rank(rank, world_size):
    if rank == 1:
        raise ValueError("this rank is broken")


def _hanging_rank(rank, world_size):
    if rank == 1:
        time.sleep(3600)


def test_results_come_back_by_rank():
    assert run_distributed(_answer, 2, "who?", timeout=60) == [("who?", 0, 2), ("who?", 1, 2)]


def test_a_failing_rank_fails_the_test_with_its_traceback():
    with pytest.raises(AssertionError, match="this rank is broken"):
        run_distributed(_broken_rank, 2, timeout=60)


def test_a_hanging_rank_fails_the_test_with_its_stack():
    with pytest.raises(AssertionError, match="in _hanging_rank"):
        run_distributed(_hanging_rank, 2, timeout=20)
