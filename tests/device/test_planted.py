"""The claimed device catches what CUDA would refuse or wait for: each planted fault, and nothing where none is."""

import gc

import numpy as np
import pytest
import torch

from megatron_mixcpt.kernels import fused
from megatron_mixcpt.objectives import step
from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
from megatron_mixcpt.runtime.stop import StopRequest
from tests.device.claimed import following
from tests.device.modes import CLAIMED
from tests.device.residency import CPU, DeviceError, Residency
from tests.device.runs import one_step
from tests.device.waits import undocumented
from tests.helpers.corpus import write_mix
from tests.helpers.nano import use_nano
from tests.train.runs import settings


@pytest.fixture
def residency():
    found = Residency()
    with following(found):
        yield found


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    use_nano()
    folder = tmp_path_factory.mktemp("planted")
    mix = write_mix(folder / "data", seq_length=16, vocab_size=120)
    return settings(
        mix, folder / "run", model={"preset": "nano"}, train={"micro_batch_size": 1, "global_batch_size": 2}
    )


def on_device(*shape):
    return torch.ones(*shape, device="cuda")


def test_what_is_made_there_or_moved_there_lies_there_and_so_does_what_is_computed_of_it(residency):
    host = torch.ones(3)
    assert host.device == CPU and not host.is_cuda
    for x in (
        on_device(3),
        torch.tensor([1.0], device=0),
        host.to("cuda"),
        host.to(CLAIMED, torch.float64),
        host.cuda(),
        host.to(on_device(1)),
        on_device(3).view(3, 1) * 2.0,
        on_device(3) + torch.tensor(2.0),  # of zero dimensions, as on CUDA
        torch.zeros_like(on_device(3)),
        torch.zeros_like(host, device=CLAIMED),
        torch.nn.Linear(3, 3).to("cuda")(on_device(2, 3)),
        on_device(3)[torch.tensor([0, 1])],
    ):
        assert x.device == CLAIMED and x.is_cuda
    assert (
        on_device(3).cpu().device == on_device(3).to("cpu").device == torch.zeros_like(on_device(3), device=CPU).device
    )
    x = on_device(3).requires_grad_()
    (x * 2).sum().backward()
    assert x.grad.device == CLAIMED


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x, host: x + host,
        lambda x, host: torch.where(host > 0, x, 0.0),
        lambda x, host: host[x.long()],
        lambda x, host: torch.cat([x, host]),
        lambda x, host: x.masked_fill_(host > 0, 1.0),
        lambda x, host: x.index_select(0, host.long()),
        lambda x, host: host.add_(x),
        lambda x, host: x.numpy(),
        lambda x, host: np.asarray(x),
        lambda x, host: x.pin_memory(),
    ],
)
def test_mixing_is_an_error(residency, mixing):
    with pytest.raises(DeviceError):
        mixing(on_device(3), torch.zeros(3))


@pytest.mark.parametrize(
    ("count", "waiting"),
    [
        (1, lambda x, host: x.sum().item()),
        (1, lambda x, host: bool(x[0] > 0)),
        (1, lambda x, host: float(x[0])),
        (1, lambda x, host: x.tolist()),
        (1, lambda x, host: x.cpu()),
        (1, lambda x, host: x.to("cpu", non_blocking=True)),  # pageable: the copy is done when the call returns
        (1, lambda x, host: host.to("cuda")),
        (1, lambda x, host: torch.tensor([1.0, 2.0], device="cuda")),
        (2, lambda x, host: torch.tensor([x[0], x[1]])),
        (1, lambda x, host: x.copy_(host)),
        (1, lambda x, host: x.nonzero()),
        (1, lambda x, host: x[x > 0]),
        (1, lambda x, host: x[host.long()]),
        (1, lambda x, host: torch.equal(x, x)),
        (0, lambda x, host: host.to("cuda", non_blocking=True)),
        (0, lambda x, host: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)),
        (0, lambda x, host: host.pin_memory().copy_(x, non_blocking=True)),
        (0, lambda x, host: x.__setitem__(x > 0, 0.0)),  # a masked fill
        (0, lambda x, host: torch.zeros(3, device="cuda").to("cuda")),
        (0, lambda x, host: x[:2].sum().double() * 3),
        (0, lambda x, host: host.sum().item()),
    ],
)
def test_what_waits_is_counted_with_its_stack(residency, count, waiting):
    waiting(on_device(3), torch.ones(3))
    assert len(residency.waits) == count
    assert all("waiting(on_device(3), torch.ones(3))" in wait.told() for wait in residency.waits)


def test_bytes_are_those_of_living_storages_by_part(residency):
    with residency.part("weights"):
        weights = on_device(256)
    assert +residency.bytes == {"weights": 1024}
    rows = weights.view(16, 16)[3:]  # no memory of its own
    with residency.part("logits"):
        products = rows * 2
    assert +residency.bytes == {"weights": 1024, "logits": 4 * 13 * 16}
    host = products.cpu()
    assert residency.peak == +residency.bytes and not host.is_cuda
    del weights, products, host
    gc.collect()
    assert +residency.bytes == {"weights": 1024}
    rows.untyped_storage().resize_(0)
    assert residency.bytes.total() == 0 and residency.peak.total() == 1024 + 4 * 13 * 16


def test_a_step_without_a_fault_mixes_nothing(values):
    residency = one_step(values)
    assert undocumented(residency, (), steps=1, micro_batches=2) == []
    assert {part for part, count in residency.peak.items() if count} >= {
        "weights", "gradients", "optimizer", "activations", "teacher", "logits", "batch"
    }  # fmt: skip


def test_a_mask_left_on_the_host_is_caught(values, monkeypatch):
    original = MixCPTLoss.of_logits

    def masked(self, logits, *args, **kwargs):
        loss = original(self, logits, *args, **kwargs)
        return loss * torch.ones(loss.shape)

    monkeypatch.setattr(MixCPTLoss, "of_logits", masked)
    with pytest.raises(DeviceError, match=r"mul.*on the device.*on the host"):
        one_step(values)


def test_words_left_on_the_host_are_caught_at_the_kernel(values, monkeypatch):
    original = fused.stats
    monkeypatch.setattr(fused, "stats", lambda *args: original(*args[:-1], args[-1].cpu()))
    with pytest.raises(DeviceError, match=r"stats_kernel cannot read .* on the host"):
        one_step(values)


def test_a_host_tensor_in_an_all_reduce_is_caught(values, monkeypatch):
    original = StopRequest.agreed
    monkeypatch.setattr(StopRequest, "agreed", lambda self, device: original(self, CPU))
    with pytest.raises(DeviceError, match=r"allreduce_.*int32\[1\] on the host"):
        one_step(values)


def test_a_number_read_in_the_loss_is_caught(values, monkeypatch):
    original = step.ForwardBackward._reduce

    def reading(self, output, **kwargs):
        assert output.sum().item() > 0
        return original(self, output, **kwargs)

    monkeypatch.setattr(step.ForwardBackward, "_reduce", reading)
    (problem,) = undocumented(one_step(values), (), steps=1, micro_batches=2)
    assert problem.startswith("not in gpu.md: item at device/test_planted.py:reading")


def test_one_more_wait_where_there_is_one_already_is_caught(values, monkeypatch):
    original = torch.distributed.all_reduce

    def reading(tensor, *args, **kwargs):
        original(tensor, *args, **kwargs)
        tensor.tolist()

    monkeypatch.setattr(torch.distributed, "all_reduce", reading)
    problems = undocumented(one_step(values), (), steps=1, micro_batches=2)
    assert any("tolist" in problem for problem in problems)
