"""Checks of the machine: each returns what it found and whether that is good, worth knowing, or an obstacle."""

from __future__ import annotations

import ipaddress
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
DEVICES = Path("/dev")


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "note", "problem"]
    text: str
    """What was found and, where it is not ok, what to do."""


def examine(folder: Path, reference_clock: float | None = None) -> Iterator[tuple[str, Finding]]:
    """`(topic, finding)` of every check; a check that fails itself is a problem of its topic.

    Args:
        folder: where runs are going to be written.
        reference_clock: seconds since the epoch by another machine, to compare this one's clock with.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("torch", _torch),
        ("triton", lambda: _library("triton", "the fused loss kernels; without it the reference runs", needed=False)),
        ("kernels", _kernels),
        ("megatron-core", _megatron),
        ("transformer-engine", lambda: _optional("transformer_engine")),
        ("apex", lambda: _optional("apex")),
        ("attention", _attention),
        ("collectives", _collectives),
        ("network", _network),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
        ("memory", _memory),
        ("clock", lambda: _clock(folder, reference_clock)),
        ("disk", lambda: _disk(folder)),
    ]
    for topic, check in checks:
        try:
            finding = check()
        except Exception as error:  # the doctor goes on with the other checks
            finding = Finding("problem", f"{type(error).__name__}: {error}")
        yield topic, finding


def _python() -> Finding:
    text = f"{platform.python_version()} in {sys.prefix}"
    return (
        Finding("ok", text) if sys.version_info >= (3, 10) else Finding("problem", f"{text}: 3.10 or newer is needed")
    )


def _library(name: str, purpose: str, *, needed: bool) -> Finding:
    try:
        return Finding("ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding("problem" if needed else "note", f"not installed: {purpose}")


def _torch() -> Finding:
    import torch

    if not torch.cuda.is_available():
        sign = _sign_of_gpus()
        if sign:
            return Finding(
                "problem",
                f"{torch.__version__} finds no CUDA device, though {sign}: see nvidia-smi; a driver that is older than "
                "this build's CUDA, or a build for the CPU, looks like this",
            )
        return Finding("note", f"{torch.__version__}, no CUDA device: training runs on the CPU with gloo")
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return Finding(
        "ok", f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(names)}"
    )


def _sign_of_gpus() -> str | None:
    """What says that this machine has GPUs, unless runs are told to take the CPU."""
    from megatron_mixcpt.runtime.devices import VARIABLE
    from megatron_mixcpt.runtime.forked import GPU_FILES

    asked = os.environ.get(VARIABLE, "").lower()
    if asked == "cuda":
        return f"{VARIABLE} is cuda"
    if asked == "cpu":
        return None
    if os.environ.get("SLURM_GPUS_ON_NODE"):
        return f"SLURM has given this job {os.environ['SLURM_GPUS_ON_NODE']} of them"
    found = next((path for name in GPU_FILES for path in DEVICES.glob(name)), None)
    return f"{found} is there" if found else None


def _kernels() -> Finding:
    """Whether Triton compiles here what training runs, and rightly."""
    import torch

    if not torch.cuda.is_available():
        return Finding("ok", "on the CPU, by the reference")
    from megatron_mixcpt.kernels import lssd_loss, lssd_loss_reference

    student, teacher = torch.randn(2, 8, 512, device="cuda").unbind()
    labels = torch.arange(8, device="cuda")

    def gradient(loss: Callable[..., Any]) -> torch.Tensor:
        (found,) = torch.autograd.grad(loss(student.requires_grad_(), teacher, labels).sum(), student)
        return found

    try:
        found = gradient(lssd_loss)
    except Exception as error:
        return Finding(
            "problem",
            f"they do not run: {type(error).__name__}: {error}. Triton compiles them when they are first used: it "
            "needs a C compiler (CC), Python's headers, and a folder that it may write to (TRITON_CACHE_DIR)",
        )
    if not torch.allclose(found, gradient(lssd_loss_reference), rtol=1e-4, atol=1e-5):
        return Finding("problem", "the fused loss has other gradients than the reference on this device")
    return Finding("ok", "the fused loss runs and agrees with the reference")


def _megatron() -> Finding:
    version = metadata.version("megatron-core")
    if not version.startswith("0.16."):
        return Finding("problem", f"{version}: this version needs 0.16.x; pip install 'megatron-core>=0.16.1,<0.17'")
    import psutil  # noqa: F401 - megatron-core's checkpoints need it

    return Finding("ok", version)


def _optional(module: str) -> Finding:
    found = util.find_spec(module) is not None
    return Finding("ok", "installed; not used" if found else "not installed; not needed")


def _attention() -> Finding:
    """Whether a GPU can run attention over packed documents, and with it long rows and `parallel.context`."""
    import torch

    if not torch.cuda.is_available():
        return Finding("ok", "over packed documents, on the CPU")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return Finding(
            "problem", f"torch {torch.__version__} has no torch.nn.attention.varlen: 2.11 or newer is needed"
        )
    rows = torch.ones(16, 2, 64, dtype=torch.bfloat16, device="cuda")
    starts = torch.tensor([0, 5, 16], dtype=torch.int32, device="cuda")
    out = varlen_attn(rows, rows, rows, starts, starts, 11, 11, window_size=(-1, 0))
    if not isinstance(out, torch.Tensor) or not torch.equal(out, rows):  # equal values have themselves as every mean
        return Finding("problem", "torch.nn.attention.varlen computes wrong values on this device")
    return Finding("ok", "over packed documents, by torch.nn.attention.varlen")


def _collectives() -> Finding:
    import torch.distributed as dist

    backends = [
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    ]
    if not dist.is_available() or "gloo" not in backends:
        return Finding("problem", "this torch has no gloo: install a build with torch.distributed")
    import torch

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    part, whole = torch.ones(2), torch.zeros(2)
    dist.all_gather_into_tensor(whole, part)
    dist.reduce_scatter_tensor(part, whole)
    dist.destroy_process_group()
    return Finding("ok", f"{' and '.join(backends)}; gather and reduce-scatter, which cut rows need, work with gloo")


def _network() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return Finding("problem", f"the host name {name} has no address: ranks cannot find each other; see /etc/hosts")
    with socket.socket() as sock:
        sock.bind((address, 0))
    if ipaddress.ip_address(address).is_loopback:
        return Finding(
            "note",
            f"{name} is {address}, which other nodes cannot reach: for runs of several nodes correct /etc/hosts, or "
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between them",
        )
    return Finding("ok", f"{name} is {address}, ports can be bound")


def _shared_memory() -> Finding:
    usage = shutil.disk_usage("/dev/shm")
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in /dev/shm"
    if usage.free < GIB:
        return Finding("problem", f"{text}: data workers die and nccl fails below 1 GiB; docker run --shm-size=8g")
    return Finding("ok", text)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"limit {soft} (hard limit {hard})"
    return Finding("ok", text) if soft >= 1024 else Finding("problem", f"{text}: ulimit -n 4096")


def _memory() -> Finding:
    import psutil

    from megatron_mixcpt.runtime.memory import available_memory

    free, size = available_memory(), psutil.virtual_memory().total
    return Finding("ok", f"{free / GIB:.1f} of {size / GIB:.1f} GiB may be taken, {os.cpu_count()} cores")


def _clock(folder: Path, reference: float | None) -> Finding:
    """Against the file server's clock, and against another machine's where one is given."""
    with tempfile.NamedTemporaryFile(dir=_existing(folder)) as file:
        skews = {"the file system": os.stat(file.name).st_mtime - time.time()}
    if reference is not None:
        skews["the reference"] = reference - time.time()
    text = ", ".join(f"{skew:+.1f} s to {name}" for name, skew in skews.items())
    if max(abs(skew) for skew in skews.values()) > 5.0:
        return Finding("problem", f"{text}: logs and job time limits will disagree; start chrony or ntpd")
    return Finding("ok", text)


def _disk(folder: Path, size: int = 64 << 20) -> Finding:
    """Write, flush, read back and rename, as a checkpoint does."""
    with tempfile.TemporaryDirectory(dir=_existing(folder)) as name:
        path = Path(name) / "probe"
        block = os.urandom(1 << 20)
        began = time.monotonic()
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - began
        renamed = path.rename(path.with_name("renamed"))
        with renamed.open("rb") as file:
            if any(file.read(len(block)) != block for _ in range(size >> 20)):
                return Finding("problem", f"{folder}: what was written is not what is read back")
    free = shutil.disk_usage(_existing(folder)).free
    return Finding("ok", f"{folder}: {size / seconds / 1e6:.0f} MB/s written and flushed, {free / GIB:.1f} GiB free")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
