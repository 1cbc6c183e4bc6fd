"""Which device each process takes: asked for, there, and agreed on by all of them before they join.

A job for GPUs on a node with a bad driver must not train on its processors without a word, and one dead GPU must not
leave the others waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.cpu_backend import CPU

VARIABLE = "MIXCPT_DEVICE"
_OWN, _VERDICT, _READ = "device/", "device-verdict", "device-verdict-read/"


def cuda_devices() -> int:
    """How many CUDA devices this process may take: none where there are none, or where MIXCPT_DEVICE is cpu.

    Raises ConfigError where MIXCPT_DEVICE is cuda and there is none, or is something else.
    """
    asked = os.environ.get(VARIABLE, "").lower()
    if asked not in ("", "cpu", "cuda"):
        raise ConfigError(f"{VARIABLE} is {asked!r}: set it to cpu or cuda, or unset it")
    if asked == "cpu":
        return 0
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and count == 0:
        raise ConfigError(
            f"{VARIABLE} is cuda, but torch finds no CUDA device on {platform.node()}: see what nvidia-smi and "
            f"CUDA_VISIBLE_DEVICES say there, or set {VARIABLE}=cpu"
        )
    return count


def take_device(local_rank: int) -> torch.device:
    """This process's device, ready for use: CUDA where there is one, or as MIXCPT_DEVICE (cpu, cuda) says.

    A process that sees a single device takes that, whatever its local rank: schedulers may bind one to each task.

    Raises ConfigError where the device that is asked for is not there or does not answer.
    """
    count = cuda_devices()
    if count == 0:
        return CPU
    if count > 1 and local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK {local_rank} has no device: {platform.node()} has {count}. Start one rank a device"
        )
    device = torch.device("cuda", 0 if count == 1 else local_rank)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{device} of {platform.node()} does not answer: {reason}; take the node out") from None
    return device


def agree_on_device(store: dist.Store, rank: int, world_size: int, local_rank: int, timeout: timedelta) -> torch.device:
    """`take_device`, known to be of one kind on all ranks, and nobody else's. Collective, over the launcher's store,
    whose `timeout` it is.

    Raises ConfigError on every rank, with what is wrong and where, as soon as all have looked.
    """
    error, device, found = None, CPU, {"host": platform.node(), "kind": "cpu"}
    try:
        device = take_device(local_rank)
        if device.type == "cuda":
            found |= {"kind": "cuda", "id": str(torch.cuda.get_device_properties(device).uuid)}
    except (ConfigError, RuntimeError) as raised:
        error = raised
        found |= {"error": str(raised)}
    store.set(f"{_OWN}{rank}", json.dumps(found))
    if rank == 0:
        store.set(_VERDICT, _gathered(store, world_size, timeout / 2))
    verdict = store.get(_VERDICT).decode()
    if verdict:
        _read_by_all(store, rank, world_size)
    if error is not None:
        raise error
    if verdict:
        raise ConfigError(verdict)
    return device


def _read_by_all(store: dist.Store, rank: int, world_size: int) -> None:
    """The store is rank 0's, and gone with it: it ends when the others have read, or are not there to read."""
    if rank > 0:
        store.set(f"{_READ}{rank}", "")
        return
    with contextlib.suppress(dist.DistStoreError):
        store.wait([f"{_READ}{other}" for other in range(1, world_size)], timedelta(seconds=5))


def _gathered(store: dist.Store, world_size: int, patience: timedelta) -> str:
    """The verdict on what all ranks found, or on one that says nothing for so long."""
    found = []
    for rank in range(world_size):
        try:
            store.wait([f"{_OWN}{rank}"], patience)
        except dist.DistStoreError:
            return (
                f"rank {rank} has not said within {patience} which device it has, and may be dead: see its "
                "log, and what nvidia-smi says on its node"
            )
        found.append(json.loads(store.get(f"{_OWN}{rank}")))
    return _verdict(found)


def _verdict(found: list[dict[str, Any]]) -> str:
    """What is wrong with the ranks' devices; empty where nothing is."""
    for rank, of in enumerate(found):
        if "error" in of:
            return f"rank {rank}: {of['error']}"
    kinds = [of["kind"] for of in found]
    if len(set(kinds)) > 1:
        without = kinds.index("cpu")
        return (
            f"rank {kinds.index('cuda')} has a CUDA device, rank {without} on {found[without]['host']} has none: see "
            f"what nvidia-smi says there, or set {VARIABLE}=cpu for all"
        )
    taken = Counter((of["host"], of["id"]) for of in found if of["kind"] == "cuda")
    shared = [key for key, count in taken.items() if count > 1]
    if shared:
        ranks = [str(rank) for rank, of in enumerate(found) if (of["host"], of.get("id")) == shared[0]]
        return f"ranks {', '.join(ranks)} on {shared[0][0]} have the same CUDA device: start one rank a device"
    return ""
