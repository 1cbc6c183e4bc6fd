"""Every property of the loss is tested on each implementation; those that need a GPU are marked `gpu` and skip."""

from collections.abc import Iterator

import numpy
import pytest
import torch

HAS_GPU = torch.cuda.is_available()  # without one, tests/conftest.py turns Triton's interpreter on

GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
IMPLEMENTATIONS = [
    pytest.param(("reference", "cpu"), id="reference-cpu"),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=GPU_MARKS),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=GPU_MARKS)
    if HAS_GPU
    else pytest.param(("triton", "cpu"), id="triton-interpreter"),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request, monkeypatch) -> Iterator[torch.device]:
    """Forces one implementation through MIXCPT_LSSD and gives the device its tensors live on."""
    name, device = request.param
    monkeypatch.setenv("MIXCPT_LSSD", name)
    if name == "triton" and device == "cpu":
        from megatron_mixcpt.kernels import fused

        monkeypatch.setattr(fused, "MAX_SPLITS", 1)  # the interpreter pays for every program; splits have their tests
    with numpy.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of every infinity
        yield torch.device(device)
