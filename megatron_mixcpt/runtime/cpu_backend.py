"""The one place that makes megatron-core run without CUDA.

megatron-core asks `torch.cuda` for its device, its random state and its synchronisation even where nothing else needs a
GPU. `cpu_backend()` answers those questions with the CPU for as long as the context is open and puts everything back at
exit. It refuses to open where CUDA is in use, so a GPU machine never runs patched.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_active = False


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of every torch call made in the context."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers recognise parameters by the string "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _nothing() -> Callable[..., None]:
    # A new function each time: torch.compile keeps a table by function and rejects one under several torch names.
    return lambda *args, **kwargs: None


def _is_about_something_else(record: logging.LogRecord) -> bool:
    """False for the tracker's warning that drawing changed the CPU's random state, which here is the one it tracks."""
    return "CPU RNG state changed" not in record.getMessage()


def _patches() -> list[tuple[str, Any]]:
    tracker = "megatron.core.tensor_parallel.random"
    return [
        (f"{tracker}._get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (f"{tracker}._set_cuda_rng_state", lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)),
        ("torch.cuda.current_device", lambda: CPU),
        ("torch.cuda.set_device", _nothing()),
        ("torch.cuda.synchronize", _nothing()),
        ("torch.cuda.empty_cache", _nothing()),
        ("torch.cuda.nvtx.range_push", _nothing()),
        ("torch.cuda.nvtx.range_pop", _nothing()),
        ("torch.cuda.get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        ("torch.cuda.set_rng_state", lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)),
        ("torch.cuda.manual_seed", lambda seed: torch.manual_seed(seed)),
    ]


def cuda_is_wanted() -> bool:
    """Whether this process trains on CUDA: a device is there and `MIXCPT_DEVICE` does not say `cpu`."""
    return torch.cuda.is_available() and os.environ.get("MIXCPT_DEVICE", "").lower() != "cpu"


@contextlib.contextmanager
def cpu_backend() -> Iterator[None]:
    """Let megatron-core run on the CPU inside the context.

    Raises:
        RuntimeError: CUDA is in use in this process, or the context is already open.
    """
    global _active
    if torch.cuda.is_initialized() or cuda_is_wanted():
        raise RuntimeError("CUDA is in use: the CPU backend would break it; MIXCPT_DEVICE=cpu forces CPU")
    if _active:
        raise RuntimeError("the CPU backend is already installed")
    with contextlib.ExitStack() as stack:
        for target, value in _patches():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(_CudaMeansCpu())
        tracker = logging.getLogger("megatron.core.tensor_parallel.random")
        tracker.addFilter(_is_about_something_else)
        stack.callback(tracker.removeFilter, _is_about_something_else)
        _active = True
        try:
            yield
        finally:
            _active = False
