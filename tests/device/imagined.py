"""One rank of a grid whose other ranks do not exist, on a device whose tensors have no values.

What a step keeps there of a model of any size is counted in seconds, without its memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_mixcpt.config import Config
from megatron_mixcpt.model import dispatch, experts
from megatron_mixcpt.runtime import parallel
from megatron_mixcpt.train import dry_run, optimizer, setup
from megatron_mixcpt.train.agreement import agree
from tests.device.residency import CPU, META, Residency
from tests.device.runs import told_apart
from tests.train.runs import grid_of


def resident_bytes(config: Config, ranks: int, rank: int) -> Residency:
    """What `rank` of `ranks` keeps on its device in a step, at its fullest in `peak`. Reads no weights."""
    with told_apart(META) as residency, _alone(rank, ranks), grid_of(config) as state:
        components = setup.build(config, state)
        dry_run.dry_run(config, components, state)
        with residency.part("optimizer"), contextlib.ExitStack() as stack:
            agree(torch.zeros(1, 2, dtype=torch.float64, device=state.device), 0, stop=False)
            if config.optimizer.offload == "none":  # the host's tensors have values
                stack.enter_context(mock.patch.object(optimizer, "gradient_norm", _finite))
            optimizer.optimizer_step(components.optimizer, 0, config.train)
    return residency


def _finite(of: MegatronOptimizer, norm: Callable[[MegatronOptimizer], float] = optimizer.gradient_norm) -> float:
    """A norm with which the step is taken: that of tensors without values is none."""
    norm(of)
    return 1.0


class _Even(dispatch.Dispatch):
    """Ranks that send each other as many rows as they have: how many they would is what tensors without values do not
    tell."""

    def __init__(self, counts: Tensor, group: dist.ProcessGroup) -> None:
        self._group, self.counts = group, counts.view(group.size(), -1).sum(0)

    def there(self, rows: Tensor) -> Tensor:
        ranks = self._group.size()
        self._sent = self._received = [len(rows) * (i + 1) // ranks - len(rows) * i // ranks for i in range(ranks)]
        self._order = torch.arange(len(rows), device=rows.device)
        return super().there(rows)


@contextlib.contextmanager
def _alone(rank: int, ranks: int) -> Iterator[None]:
    """Collectives with the others bring nothing, and take no time."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    join = dist.init_process_group
    place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "none", "MASTER_PORT": "0"}
    with (
        mock.patch.dict(os.environ, place),
        mock.patch.object(parallel, "_store", lambda *_: FakeStore()),
        mock.patch.object(parallel, "agree_on_device", lambda *_: CPU),
        mock.patch.object(dist, "init_process_group", lambda backend, **options: join("fake", **options)),
        mock.patch.object(setup, "load_hf", lambda *_: None),
        mock.patch.object(setup, "weights_fingerprint", lambda *_: None),
        mock.patch.object(experts, "Dispatch", _Even),
        mock.patch.object(dispatch, "_exchanged", lambda rows, *_: torch.empty_like(rows)),  # whose stand-ins are empty
    ):
        yield
