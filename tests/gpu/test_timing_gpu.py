"""The clock of a GPU: never waits for the device, and its parts are no more than the time that passed."""

import time

import pytest
import torch

from megatron_mixcpt.runtime.timing import StepTimer, section

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_sections_on_the_device_add_up_without_a_synchronisation():
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, device=device)
    a @ a
    torch.cuda.synchronize()
    timer = StepTimer(device)
    timer.install()
    began = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with section("forward"):
            for _ in range(20):
                a @ a
        with section("backward"):
            for _ in range(40):
                a @ a
        early = timer.lap()  # the device is behind: what it has not done is left for later
    finally:
        torch.cuda.set_sync_debug_mode("default")
        timer.remove()
    torch.cuda.synchronize()
    late = timer.lap()
    whole = time.perf_counter() - began
    parts = {name: early.get(name, 0.0) + late.get(name, 0.0) for name in {*early, *late}}
    assert parts["time/forward"] > 0 and parts["time/backward"] > 0
    assert sum(parts.values()) <= whole
