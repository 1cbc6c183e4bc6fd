"""Which device a process takes is said, looked for, and agreed on before anything waits for anybody."""

import os
import time

import pytest
import torch
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime import devices
from megatron_mixcpt.runtime.devices import take_device
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.corpus import write_mix
from tests.helpers.spawn import run_distributed
from tests.train.runs import settings


def claim(monkeypatch, count, dead=()):
    """As if this machine had `count` devices, of which some do not answer."""

    def set_device(device):
        if device.index in dead:
            raise RuntimeError("CUDA error: device unavailable\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(devices.torch, "zeros", lambda *args, **options: None)


def test_a_device_that_is_asked_for_and_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("MIXCPT_DEVICE", "cuda")
    with pytest.raises(ConfigError, match="MIXCPT_DEVICE is cuda, but"), parallel_context():
        pass
    monkeypatch.setenv("MIXCPT_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="set it to cpu or cuda"):
        take_device(0)
    monkeypatch.setenv("MIXCPT_DEVICE", "cpu")
    assert take_device(7).type == "cpu"


def test_the_local_rank_is_held_against_the_devices(monkeypatch):
    monkeypatch.delenv("MIXCPT_DEVICE", raising=False)
    claim(monkeypatch, 4, dead=[2])
    assert take_device(3) == torch.device("cuda", 3)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK 4 has no device: .* has 4"):
        take_device(4)
    with pytest.raises(ConfigError, match=r"cuda:2 of .* does not answer: CUDA error: device unavailable;"):
        take_device(2)
    claim(monkeypatch, 1)
    assert take_device(5) == torch.device("cuda", 0)  # bound to this task by the scheduler


def of(kind="cuda", host="n1", **more):
    return {"kind": kind, "host": host, "id": f"GPU-{host}-{more.pop('number', 0)}", **more}


def test_what_the_ranks_found_is_judged_once_for_all():
    assert devices._verdict([of(), of(number=1), of(host="n2")]) == ""
    assert devices._verdict([of("cpu"), of("cpu")]) == ""
    assert "rank 0 has a CUDA device, rank 1 on n2 has none" in devices._verdict([of(), of("cpu", "n2")])
    assert "ranks 0, 2 on n1 have the same CUDA device" in devices._verdict([of(), of(number=1), of()])
    assert devices._verdict([of(), of("cpu", error="no driver")]) == "rank 1: no driver"


def claims_cuda(rank, world_size):
    """Rank 1 asks for a device that is not there; returns what each rank says."""
    if rank == 1:
        os.environ["MIXCPT_DEVICE"] = "cuda"
    try:
        with parallel_context(timeout_minutes=60):
            return "nothing"
    except ConfigError as error:
        return str(error)


def waits_for_its_device(rank, world_size):
    """Rank 1's device does not answer while rank 0 waits; returns what rank 0, which has the store, says."""
    if rank == 1:
        devices.take_device = lambda local_rank: time.sleep(30) or devices.CPU
    try:
        with parallel_context(timeout_minutes=0.3):
            return "nothing"
    except (ConfigError, RuntimeError) as error:  # rank 1's: the store is gone with rank 0
        return str(error)


@pytest.mark.distributed
def test_a_device_that_does_not_answer_is_named_by_its_rank():
    told, _ = run_distributed(waits_for_its_device, 2)
    assert told.startswith("rank 1 has not said within 0:00:09 which device it has")


@pytest.mark.parametrize(
    "command",
    [["certify", "train.yaml"], ["certify-loss", "tests.certify.losses:any", "--device", "cuda"]],
)
def test_nothing_falls_back_to_the_processor_where_cuda_is_asked_for(monkeypatch, tmp_path, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXCPT_DEVICE", "cuda")
    mix = write_mix(tmp_path / "data")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings(mix, tmp_path / "run")))
    assert main(command) == 2
    assert "MIXCPT_DEVICE is cuda, but torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.distributed
def test_one_rank_without_its_device_ends_all_of_them_with_the_reason():
    first, second = run_distributed(claims_cuda, 2)  # well before the hour that a group would wait
    assert first == f"rank 1: {second}" and second.startswith("MIXCPT_DEVICE is cuda, but torch finds no CUDA device")
