"""The process grid: who stands where, what is refused, what is left behind."""

import pytest
import torch
import torch.distributed as dist

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.parallel import check_grid, parallel_context
from tests.helpers.spawn import run_distributed

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


def places(rank, world_size, grids):
    result = []
    for tensor, pipeline in grids:
        with parallel_context(tensor=tensor, pipeline=pipeline) as state:
            one = torch.ones(1)
            dist.all_reduce(one, group=state.tensor_group)
            dist.all_reduce(one, group=state.data_group)
            dist.all_reduce(one, group=state.pipeline_group)
            result.append(
                (
                    (state.rank, state.tensor_rank, state.pipeline_rank, state.data_rank),
                    state.is_last_stage,
                    int(one),
                )
            )
    return result


@pytest.mark.distributed
def test_every_process_has_a_place_of_its_own():
    grids = [(2, 2), (1, 2), (2, 1), (1, 1), (4, 1)]
    ranks = run_distributed(places, 4, grids)
    for index, (tensor, pipeline) in enumerate(grids):
        seen = set()
        for rank, result in enumerate(ranks):
            (global_rank, t, p, d), last, product = result[index]
            assert global_rank == rank
            assert last == (p == pipeline - 1)
            assert product == 4  # sizes of the three groups multiply to the world
            seen.add((t, p, d))
        data = 4 // (tensor * pipeline)
        assert seen == {(t, p, d) for t in range(tensor) for p in range(pipeline) for d in range(data)}


def test_one_process_needs_no_launcher_and_leaves_nothing():
    for _ in range(2):
        with parallel_context() as state:
            assert (state.rank, state.world_size, state.tensor_size, state.data_size) == (0, 1, 1, 1)
            assert dist.is_initialized()
        assert not dist.is_initialized()


def test_seeds_are_set():
    with parallel_context(seed=3):
        first = torch.rand(2)
    with parallel_context(seed=3):
        assert torch.equal(torch.rand(2), first)
    with parallel_context(seed=4):
        assert not torch.equal(torch.rand(2), first)


@pytest.mark.parametrize("world, tensor, pipeline", [(1, 2, 1), (4, 3, 1), (4, 2, 4), (2, 0, 1)])
def test_processes_that_do_not_divide_are_refused(world, tensor, pipeline):
    with pytest.raises(ConfigError, match=r"parallel\.tensor.*parallel\.pipeline.*nproc"):
        check_grid(world, tensor, pipeline)


@pytest.mark.parametrize("world, tensor, context, expert", [(4, 2, 1, 4), (4, 1, 2, 3), (2, 1, 1, 0)])
def test_ranks_that_do_not_divide_into_expert_ranks_are_refused(world, tensor, context, expert):
    check_grid(world, tensor, 1, context, world // tensor)
    with pytest.raises(ConfigError, match=rf"parallel\.expert={expert} does not divide the {world // tensor} data"):
        check_grid(world, tensor, 1, context, expert)


def test_a_refused_grid_leaves_nothing():
    with pytest.raises(ConfigError), parallel_context(tensor=2):
        pass
    assert not dist.is_initialized()


def test_half_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT"), parallel_context():
        pass
