"""The one place that makes megatron-core run without CUDA.

megatron-core asks `torch.cuda` for its device, its random state and its synchronisation even where nothing else needs a
GPU. `cpu_backend()` answers those questions with the CPU for as long as the context is open and puts everything back at
exit. It refuses to open where CUDA is in use, so a GPU machine never runs patched.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

CPU = torch.device("cpu")
# What takes `device=`. Each by itself: a mode that sees every call of torch cost a quarter of a small model's step.
CONSTRUCTORS = (
    *(
        "tensor",
        "as_tensor",
        "arange",
        "linspace",
        "eye",
        "randperm",
        "empty",
        "zeros",
        "ones",
        "full",
        "rand",
        "randn",
    ),
    *("randint", "empty_strided", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)
METHODS = ("to", "new_tensor", "new_empty", "new_zeros", "new_ones", "new_full")
_active = False


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(name: str, of: Any) -> Callable[..., Any]:
    """`of.name`, a function that takes `device=`, with the CPU where CUDA is meant."""
    function = getattr(of, name)

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if name == "to" and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return function(*args, **kwargs)

    return made


def _type_on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`: the optimizers recognise parameters by the string "torch.cuda.FloatTensor"."""

    def type_of(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = function(x, *args, **kwargs)
        if not isinstance(found, str) or found.startswith("torch.cuda."):  # a mode that torch asks calls this again
            return found
        return found.replace("torch.", "torch.cuda.", 1)

    return type_of


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
        ("torch.Tensor.cuda", lambda x, *args, **kwargs: x),
        ("torch.Tensor.type", _type_on_cuda(torch.Tensor.type)),
        *((f"torch.{name}", _on_cpu(name, torch)) for name in CONSTRUCTORS),
        *((f"torch.Tensor.{name}", _on_cpu(name, torch.Tensor)) for name in METHODS),
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
        with CPU:  # when first entered, such a context notes which functions it is about: torch's own
            torch.empty(0)
        for target, value in _patches():
            stack.enter_context(mock.patch(target, value))
        tracker = logging.getLogger("megatron.core.tensor_parallel.random")
        tracker.addFilter(_is_about_something_else)
        stack.callback(tracker.removeFilter, _is_about_something_else)
        _active = True
        try:
            yield
        finally:
            _active = False
