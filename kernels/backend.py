"""Which implementation computes: the fused Triton kernels on a GPU, the cache-blocked reference elsewhere."""

import functools
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from megatron_mixcpt.kernels import reference


def choose_backend(device: torch.device) -> ModuleType:
    """The implementation for tensors on `device`; MIXCPT_LSSD=reference|triton forces one.

    Forcing `triton` raises ImportError where it is not installed, and ValueError for CPU tensors unless its
    interpreter is on (TRITON_INTERPRET=1), in which the kernels run on the CPU, slowly.
    """
    forced = os.environ.get("MIXCPT_LSSD", "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"MIXCPT_LSSD={forced!r}: must be 'reference', 'triton' or unset")
    if forced == "reference" or (not forced and device.type != "cuda"):
        return reference
    if importlib.util.find_spec("triton") is None:
        if forced:
            raise ImportError("MIXCPT_LSSD=triton, but triton is not installed (pip install triton)")
        _warn_that_triton_is_missing()
        return reference
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"MIXCPT_LSSD=triton, but the logits are on {device}: that needs TRITON_INTERPRET=1")
    from megatron_mixcpt.kernels import fused

    return fused


@functools.cache
def _warn_that_triton_is_missing() -> None:
    warnings.warn(
        "triton is not installed: the loss on the GPU runs in plain PyTorch, several times slower", stacklevel=3
    )
