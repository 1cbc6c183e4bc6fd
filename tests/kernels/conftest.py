"""Every property of the loss is tested on each implementation that this machine can run."""

import pytest
import torch

IMPLEMENTATIONS = [pytest.param(("reference", "cpu"), id="reference-cpu")]


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request, monkeypatch) -> torch.device:
    """Forces one implementation through MIXCPT_LSSD and gives the device its tensors live on."""
    name, device = request.param
    monkeypatch.setenv("MIXCPT_LSSD", name)
    return torch.device(device)
