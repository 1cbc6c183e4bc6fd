"""A device that is only claimed: a run on the CPU that believes in `cuda:0`, and is told what CUDA would have refused.

    with claimed_device() as residency:     # around what opens `parallel_context`
        train(config)
    residency.waits, residency.peak

CPU tests cannot see a tensor that was left on the host, a copy that waits, or what would lie in GPU memory. Here every
tensor is a CPU tensor and every value is right; what is added is where its storage would lie (residency.py), which two
modes follow through every call (modes.py). Why not torch's fake CUDA tensors: they have no values, so a run could not
go on after its first `.item()`, and autograd aborts on them for want of a device guard in a CPU build. Why not a device
of our own (PrivateUse1): megatron-core asks for CUDA by name, and everything would have to be computed twice over.

What the modes cannot see is replaced: Triton's launches, megatron-core's questions to `torch.cuda`, threads, and
collectives of Python objects. Not seen at all: memory that libraries take (cuBLAS, NCCL, fragmentation), what a
kernel's workspace takes, streams.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mixcpt.kernels import fused, reference
from megatron_mixcpt.runtime import parallel
from megatron_mixcpt.runtime.cpu_backend import CONSTRUCTORS, METHODS
from tests.device.modes import CLAIMED, Asked, Computed, Flash
from tests.device.residency import CPU, META, DeviceError, Residency

OBJECT_COLLECTIVES = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


@contextlib.contextmanager
def claimed_device(memory: torch.device = CPU) -> Iterator[Residency]:
    """Whatever process grid is joined inside has `cuda:0` for its device, in this thread and those it starts.

    `memory`: what its tensors truly are; those on META have no values, and the host reads ones.
    """
    residency = Residency(memory)
    with mock.patch.object(parallel, "_join_grid", _claiming(parallel._join_grid, residency)):
        yield residency


@contextlib.contextmanager
def deepspeed_claiming() -> Iterator[None]:
    """Around `claimed_device`: DeepSpeed, which names devices itself, calls this one as all others do."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class ClaimedAccelerator(CPU_Accelerator):
        def device_name(self, device_index: int | None = None) -> str:
            return CLAIMED.type if device_index is None else str(CLAIMED)

        def current_device_name(self) -> str:
            return str(CLAIMED)

        def current_device(self) -> int:
            return CLAIMED.index

    with mock.patch.object(real_accelerator, "ds_accelerator", ClaimedAccelerator()):
        yield


def _claiming(join: Callable[..., Any], residency: Residency) -> Callable[..., Any]:
    def claim(
        stack: contextlib.ExitStack, store: Any, rank: int, size: int, local: int, device: Any, *rest: Any
    ) -> Any:
        stack.enter_context(following(residency))
        return join(stack, store, rank, size, local, CLAIMED, *rest)

    return claim


@contextlib.contextmanager
def following(residency: Residency) -> Iterator[None]:
    """The modes and replacements, within the CPU backend."""
    with contextlib.ExitStack() as stack:
        for target, value in (_replacements(residency) | _torchs_own()).items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(Computed(residency))
        stack.enter_context(Asked(residency))
        yield


def _replacements(residency: Residency) -> dict[str, Any]:
    replaced = {
        "megatron_mixcpt.model.specs.cuda_is_wanted": lambda: True,  # the layers that a GPU runs
        "megatron_mixcpt.kernels.fused.MAX_SPLITS": 1,  # as many as the reference has
        "torch.cuda.current_device": lambda: CLAIMED.index,
        "torch.cuda.synchronize": lambda *args: residency.wait("synchronize"),
        "torch.cuda.Event": functools.partial(Event, residency),
        "torch.cuda.device": lambda device: contextlib.nullcontext(),
        "torch.cuda.get_device_name": lambda *args: "a device that is only claimed",
        "torch.cuda.get_device_capability": lambda *args: (9, 0),
        "torch.cuda.max_memory_allocated": lambda *args: residency.peak.total(),
        "torch.UntypedStorage.resize_": _resizing(residency, torch.UntypedStorage.resize_),
        "torch.histc": _of_integers(torch.histc),
        "torch.nn.attention.varlen.varlen_attn": functools.partial(_varlen_attention, residency),
        "triton.runtime.interpreter.GridExecutor.__call__": _launching(residency),
        "torch._C._distributed_c10d.Work.wait": _unasked(torch.distributed.Work.wait),
        "threading.Thread.run": _following_too(residency, threading.Thread.run),
    }
    for name in ("stats", "combine", "gradient"):
        replaced[f"megatron_mixcpt.kernels.fused.{name}"] = _computing(residency, name)
    for name in OBJECT_COLLECTIVES:
        replaced[f"torch.distributed.{name}"] = _of_objects(residency, getattr(torch.distributed, name))
    return replaced


def _torchs_own() -> dict[str, Any]:
    """What the CPU backend replaced to mean the CPU where CUDA is asked for: here it is asked for in earnest."""
    wrapped = {f"torch.{name}": getattr(torch, name) for name in CONSTRUCTORS}
    wrapped |= {f"torch.Tensor.{name}": getattr(Tensor, name) for name in METHODS}
    return {target: inspect.unwrap(value) for target, value in wrapped.items()} | {
        "torch.Tensor.cuda": torch._C.TensorBase.cuda
    }


class Event:
    """A CUDA event of a device that is always done."""

    def __init__(self, residency: Residency, **_: Any) -> None:
        self._residency = residency

    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 0.0

    def synchronize(self) -> None:
        self._residency.wait("synchronize an event")


def _resizing(residency: Residency, resize: Callable[..., Any]) -> Callable[..., Any]:
    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        residency.resized(storage)
        return result

    return resize_


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Neither mode is asked inside."""
    from torch.utils._python_dispatch import _disable_current_modes

    stack = contextlib.ExitStack()
    stack.enter_context(_disable_current_modes())
    stack.enter_context(torch._C.DisableTorchFunction())
    return stack


def _launching(residency: Residency) -> Callable[..., Any]:
    """A kernel's launch; on CUDA a pointer to the host is an error, or a fault of the device."""

    def checked(executor: Any, *args: Any, **kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and not residency.holds(value):
                raise DeviceError(f"the kernel {executor.fn.__name__} cannot read {list(value.shape)} on the host")
        residency.queue()

    return checked


def _computing(residency: Residency, name: str) -> Callable[..., Any]:
    """What launches kernels, and what they would have computed, by their reference: Triton's interpreter takes long."""
    launch, reference_of = getattr(fused, name), getattr(reference, name)

    def computed(*args: Any, **kwargs: Any) -> Any:
        results = launch(*args, **kwargs)
        if residency.memory == CPU:
            with _unseen():
                right = reference_of(*args, **kwargs)
                for key, result in (results or {}).items():
                    result.copy_(right[key])
        return results

    return computed


def _of_integers(histc: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On CUDA histograms of integers are integers; the CPU has none (transformers counts the tokens of experts so)."""

    def counted(values: Tensor, **kwargs: Any) -> Tensor:
        return (
            histc(values, **kwargs) if values.is_floating_point() else histc(values.float(), **kwargs).to(values.dtype)
        )

    return counted


def _unasked(wait: Callable[..., Any]) -> Callable[..., Any]:
    """Of a collective: gloo copies what came with operators of its own; NCCL's stream waits, and the host does not."""

    def unasked(*args: Any, **kwargs: Any) -> Any:
        with _unseen():
            return wait(*args, **kwargs)

    return unasked


def _of_objects(residency: Residency, collective: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL moves pickled objects through the device by itself, and waits."""

    def objects(*args: Any, **kwargs: Any) -> Any:
        residency.wait(collective.__name__)
        with _unseen():
            return collective(*args, **kwargs)

    return objects


def _following_too(residency: Residency, run: Callable[..., Any]) -> Callable[..., Any]:
    def body(thread: threading.Thread) -> None:
        with residency.phase(f"thread {thread.name}"), Computed(residency), Asked(residency):
            run(thread)

    return body


def _varlen_attention(
    residency: Residency,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """torch's variable-length attention, which has no CPU version, for `[tokens, heads, d]`."""
    for x in (query, key, value, cu_queries, cu_keys):
        if not residency.holds(x):
            raise DeviceError(f"varlen_attn: {list(x.shape)} is on the host")
    assert query.dtype in (torch.bfloat16, torch.float16) and query.shape[2] % 8 == 0
    assert cu_queries.dtype == cu_keys.dtype == torch.int32 and (enable_gqa or key.shape[1] == query.shape[1])
    if residency.memory == META:
        return Flash.apply(query, key, value)
    with _unseen():
        begins, key_begins = cu_queries.tolist(), cu_keys.tolist()
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = [
        _span(query[q0:q1], key[k0:k1], value[k0:k1], window, scale)
        for q0, q1, k0, k1 in zip(begins, begins[1:], key_begins, key_begins[1:])
        if q1 > q0
    ]
    keys = [end - begin for begin, end in itertools.pairwise(key_begins)]
    assert max(len(part) for part in parts) <= max_queries and max(keys) <= max_keys
    return torch.cat(parts)


def _span(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """One document: its last query sees all keys, each before it one fewer."""
    steps = torch.arange(len(key), device=query.device)
    distance = steps[len(key) - len(query) :].unsqueeze(1) - steps
    near = (distance >= 0) & (distance < (window or len(key)))
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [heads, tokens, d]
    grouped = k.shape[0] != q.shape[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scale, enable_gqa=grouped).transpose(0, 1)
