"""The two modes that every torch call passes: one sees what the program asks for, one what is computed.

A tensor on the claimed device answers `cuda:0` when it is asked for its device, and is in truth a CPU tensor whose
storage `Residency` has taken. Nothing is simulated beyond where a tensor lies: values are computed, and are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from tests.device.residency import CPU, META, DeviceError, Residency

CLAIMED = torch.device("cuda", 0)
aten = torch.ops.aten

# Wait for the device on CUDA, because the host must know a value or the size of the result.
WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.unique_dim.default: "unique",
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ANSWERED = {aten._local_scalar_dense.default, aten.equal.default, aten.copy_.default}
FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
MASKS = (torch.bool, torch.uint8)


class Computed(TorchDispatchMode):
    """Sees every operator: refuses those that mix host and device, notes those that wait, takes what they make."""

    def __init__(self, residency: Residency) -> None:
        super().__init__()
        self._residency = residency

    def _tensors(self, values: Any) -> list[Tensor]:
        places = ("cpu", self._residency.memory.type)
        return [value for value in tree_iter(values) if isinstance(value, Tensor) and value.device.type in places]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunction():  # in here a tensor's device is the true one
            return self._followed(func, args, kwargs or {})

    def _followed(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        residency = self._residency
        inputs = self._tensors((args, kwargs))
        on_device = [x for x in inputs if residency.holds(x)]
        if func.namespace == "c10d":
            return self._collective(func, inputs, len(on_device), args, kwargs)
        if on_device:
            self._check(func, inputs, on_device, args, kwargs)
            residency.queue()
        results = self._answer(func, args) if func in ANSWERED else NotImplemented
        if func is aten.mm.dtype and residency.memory == CPU:  # which the CPU has not
            results = args[0].to(args[2]) @ args[1].to(args[2])
        if results is NotImplemented:
            results = func(*args, **kwargs)
        if bool(on_device) if residency.making is None else residency.making:
            known = {x.untyped_storage()._cdata for x in inputs}
            for result in self._tensors(results):
                if result.untyped_storage()._cdata not in known:
                    residency.take(result)
        if func is aten.resize_.default:
            residency.resized(args[0].untyped_storage())
        return results

    def _check(self, func: Any, inputs: list[Tensor], on_device: list[Tensor], args: tuple, kwargs: dict) -> None:
        residency = self._residency
        if func is aten.copy_.default:
            if len(on_device) < len(inputs):
                blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                crossed(residency, args[1], args[0], blocks=blocks)
            return
        if func in WAITING:
            residency.wait(WAITING[func])
        mixed = len(on_device) < len(inputs) and any(x.dim() > 0 and not residency.holds(x) for x in inputs)
        if func in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in MASKS for index in indices):
                if not _fills(args, kwargs, indices):
                    residency.wait("indexing by a mask")
            elif any(not residency.holds(index) for index in indices):
                residency.wait("indexing from the host")
            rest = [args[0], *self._tensors((args[2:], kwargs))]
            mixed = not residency.holds(args[0]) or any(x.dim() > 0 and not residency.holds(x) for x in rest)
        if mixed:
            raise DeviceError(f"{func}: {_places(residency, inputs)}")

    def _answer(self, func: Any, args: tuple) -> Any:
        """What the host is told of values that do not exist: they are all 1."""
        source = args[1] if func is aten.copy_.default else args[0]
        if not source.is_meta or (func is aten.copy_.default and args[0].is_meta):
            return NotImplemented
        if func is aten.copy_.default:
            return args[0].fill_(1)
        return True if func is aten.equal.default else torch.ones((), dtype=source.dtype).item()

    def _collective(self, func: Any, inputs: list[Tensor], num_on_device: int, args: tuple, kwargs: dict) -> Any:
        if func.overloadpacket is torch.ops.c10d.barrier:
            self._residency.wait("barrier")
        elif num_on_device < len(inputs):
            raise DeviceError(f"{func}, which NCCL does on the device alone: {_places(self._residency, inputs)}")
        if num_on_device:
            self._residency.queue()
        if self._residency.memory == META:  # nothing to send
            args, kwargs = tree_map_only(Tensor, lambda x: torch.empty(0, dtype=x.dtype), (args, kwargs))
        return func(*args, **kwargs)


def _fills(args: tuple, kwargs: dict[str, Any], indices: list[Tensor]) -> bool:
    """Whether index_put_ becomes masked_fill_, which waits for nothing: one mask, and one number from the host."""
    value = args[2] if len(args) > 2 else None
    one = isinstance(value, Tensor) and value.dim() == 0
    return one and len(indices) == 1 and not (args[3] if len(args) > 3 else kwargs.get("accumulate", False))


def crossed(residency: Residency, source: Tensor, into: Tensor, *, blocks: bool) -> None:
    """A copy between host and device: it waits unless asked not to, and to the host unless that memory is pinned."""
    if source.numel() == 0:
        return
    if residency.holds(source):
        if blocks or not residency.is_pinned(into):
            residency.wait("copy to the host")
    elif blocks:
        residency.wait("copy to the device")


def _places(residency: Residency, inputs: list[Tensor]) -> str:
    return ", ".join(
        f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on the {'device' if residency.holds(x) else 'host'}"
        for x in inputs
    )


class Flash(torch.autograd.Function):
    """What a flash kernel keeps of attention over queries `[..., d]`, without values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _type(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Optimizers know parameters by the name of their type, which for meta tensors says so."""
    found = torch._C.TensorBase.type(x, *args, **kwargs)
    return found.replace("meta.", "") if isinstance(found, str) else found


class Asked(TorchFunctionMode):
    """Sees every call of torch's Python interface: what it is asked to put where, and what leaves it for Python."""

    def __init__(self, residency: Residency) -> None:
        super().__init__()
        self._residency = residency
        of = Tensor
        self._handlers: dict[Any, Callable[..., Any]] = {
            of.device.__get__: self._device,  # type: ignore[attr-defined]
            of.is_cuda.__get__: lambda x, *_: residency.holds(x),  # type: ignore[attr-defined]
            of.is_cpu.__get__: lambda x, *_: not residency.holds(x),  # type: ignore[attr-defined]
            of.get_device: lambda x: 0 if residency.holds(x) else -1,
            of.to: self._to,
            of.cpu: lambda x, **_: self._move(x, device=False),
            of.cuda: lambda x, device=None, non_blocking=False, **_: self._move(
                x, device=True, non_blocking=non_blocking
            ),
            of.tolist: self._tolist,
            of.numpy: self._to_numpy(of.numpy),
            of.__array__: self._to_numpy(of.__array__),
            of.pin_memory: self._pin,
            of.is_pinned: lambda x, *_: residency.is_pinned(x),
            of.backward: lambda x, gradient=None, *args, **kwargs: self._backward(x, gradient, *args, **kwargs),
            torch.autograd.backward: self._backward,
        }
        if residency.memory == META:
            self._handlers[of.type] = _type
            self._handlers[F.scaled_dot_product_attention] = lambda q, k, v, **_: Flash.apply(q, k, v)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if func in FROM_VALUES:
            args = (tree_map_only(Tensor, self._read, args[0]), *args[1:]) if isinstance(args[0], list) else args
        pinned = kwargs.pop("pin_memory", False)
        wanted = self._wanted(kwargs.get("device"))
        if wanted is None:
            result = func(*args, **kwargs)
        else:
            result = self._placed(func, args, kwargs, wanted)
        if pinned:
            self._residency.pin(result)
        return result

    def _wanted(self, device: Any) -> bool | None:
        """Whether a `device` argument means the claimed one; None where there is none, or it is neither."""
        if device is None or isinstance(device, bool):
            return None
        if isinstance(device, int):
            return True
        kind = torch.device(device).type
        return {"cuda": True, "cpu": False}.get(kind)

    def _placed(self, func: Any, args: tuple, kwargs: dict[str, Any], wanted: bool) -> Any:
        memory = self._residency.memory if wanted else CPU
        with self._residency.made(on_device=wanted):
            result = func(*args, **{**kwargs, "device": memory})
        if not isinstance(result, Tensor):
            return result
        given = [x for x in args if isinstance(x, Tensor) and x.data_ptr() == result.data_ptr() and x.numel()]
        if given and self._residency.holds(result) != wanted:
            return self._move(result, device=wanted)
        if wanted and not self._residency.holds(result):  # of values in Python, which no operator made
            self._residency.take(result)
        if wanted and func in FROM_VALUES and result.numel():
            self._residency.wait("copy to the device")
        return result

    def _device(self, x: Tensor, *_: Any) -> torch.device:
        real = Tensor.device.__get__(x)  # type: ignore[attr-defined]
        return CLAIMED if real == self._residency.memory and self._residency.holds(x) else real

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted = self._wanted(kwargs.pop("device", None))
        other = kwargs.pop("other", None)
        if args and isinstance(args[0], Tensor):
            other, *args = args
        if other is not None:
            wanted, args = self._residency.holds(other), (other.dtype, *args)
        elif args and not isinstance(args[0], torch.dtype):
            place, *args = args
            wanted = self._wanted(place) if place is not None else wanted
            if wanted is None and place is not None:
                return Tensor.to(x, place, *args, **kwargs)
        dtype = kwargs.pop("dtype", None)
        flags = [value for value in args if isinstance(value, bool)]
        dtypes = [value for value in args if isinstance(value, torch.dtype)]
        dtype = dtypes[0] if dtypes else dtype
        non_blocking = kwargs.pop("non_blocking", flags[0] if flags else False)
        copy = kwargs.pop("copy", flags[1] if len(flags) > 1 else False)
        if wanted is None or wanted == self._residency.holds(x):
            return x.to(dtype or x.dtype, copy=copy, **kwargs)
        return self._move(x, device=wanted, non_blocking=non_blocking, dtype=dtype)

    def _move(self, x: Tensor, *, device: bool, non_blocking: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        if self._residency.holds(x) == device:
            return x if dtype is None else x.to(dtype)
        with self._residency.made(on_device=device):
            if self._residency.memory == META:
                result = (torch.empty_like if device else torch.ones_like)(
                    x, dtype=dtype or x.dtype, device=META if device else CPU
                )
            else:
                result = x.to(dtype or x.dtype, copy=True)
        crossed(self._residency, x, result, blocks=not non_blocking)
        return result

    def _read(self, x: Tensor) -> Any:
        """A tensor in a list of values: its number is read."""
        if self._residency.holds(x):
            self._residency.wait("item")
        return torch.ones((), dtype=x.dtype).item() if x.is_meta else x

    def _tolist(self, x: Tensor) -> Any:
        if self._residency.holds(x):
            self._residency.wait("tolist")
        return (torch.ones(x.shape, dtype=x.dtype) if x.is_meta else x).tolist()

    def _to_numpy(self, func: Callable[..., Any]) -> Callable[..., Any]:
        def convert(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._residency.holds(x):
                raise DeviceError(f"numpy cannot read {list(x.shape)} on the device: copy it to the host first")
            return func(x, *args, **kwargs)

        return convert

    def _pin(self, x: Tensor, *_: Any) -> Tensor:
        if self._residency.holds(x):
            raise DeviceError(f"only host memory can be pinned, and {list(x.shape)} is on the device")
        copied = x.clone()
        self._residency.pin(copied)
        return copied

    def _backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: Any = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """As `torch.autograd.backward`, with this mode on, which torch turns off while a call is handled: backward runs
        functions of the program's own."""
        outputs, gradients = ((x,) if x is None or isinstance(x, Tensor) else tuple(x) for x in (tensors, grad_tensors))
        gradients = torch.autograd._make_grads(outputs, gradients * (len(outputs) // len(gradients)), False)
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                outputs,
                gradients,
                bool(create_graph if retain_graph is None else retain_graph),
                create_graph,
                tuple(inputs or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )
