"""The CPU backend answers for CUDA inside its context, leaves nothing behind, and stays away from real CUDA."""

import pytest
import torch

from megatron_mixcpt.runtime.cpu_backend import cpu_backend, cuda_is_wanted


def patched_values():
    import megatron.core.tensor_parallel.random as tracker

    names = (
        "current_device",
        "set_device",
        "synchronize",
        "empty_cache",
        "get_rng_state",
        "set_rng_state",
        "manual_seed",
    )
    values = {name: getattr(torch.cuda, name) for name in names}
    return values | {
        "push": torch.cuda.nvtx.range_push,
        "pop": torch.cuda.nvtx.range_pop,
        "_get": tracker._get_cuda_rng_state,
        "_set": tracker._set_cuda_rng_state,
    }


def test_everything_is_put_back_even_after_an_error():
    before = patched_values()
    with pytest.raises(KeyError), cpu_backend():
        assert not any(patched_values()[name] is value for name, value in before.items())
        raise KeyError
    assert patched_values() == before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_cuda_means_cpu_inside():
    with cpu_backend():
        assert torch.cuda.current_device() == torch.device("cpu")
        for tensor in (
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.device("cuda", 0)),
            torch.zeros(2).cuda(),
            torch.zeros(2).to("cuda:0"),
            torch.zeros(2).to(device="cuda"),
            torch.empty_like(torch.zeros(2), device="cuda"),
        ):
            assert tensor.device.type == "cpu"
        # How megatron-core's optimizers recognise parameters they know.
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
        torch.cuda.synchronize()


def test_a_context_of_a_device_means_what_it_says_inside_and_afterwards():
    with cpu_backend():
        with torch.device("meta"):
            assert torch.zeros(2).is_meta and torch.empty_like(torch.zeros(2)).is_meta
            assert torch.zeros(2, device="cuda").device.type == "cpu"
            assert torch.zeros(1, device="cpu").type() == "torch.cuda.FloatTensor"
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta


def test_random_state_is_the_cpus():
    with cpu_backend():
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)


def test_refuses_a_process_that_uses_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is in use"), cpu_backend():
        pass


def test_refuses_a_machine_with_cuda_unless_told_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("MIXCPT_DEVICE", raising=False)
    assert cuda_is_wanted()
    with pytest.raises(RuntimeError, match="MIXCPT_DEVICE"), cpu_backend():
        pass
    monkeypatch.setenv("MIXCPT_DEVICE", "cpu")
    with cpu_backend():
        assert torch.zeros(1, device="cuda").device.type == "cpu"


def test_is_installed_once():
    with cpu_backend():
        with pytest.raises(RuntimeError, match="already"), cpu_backend():
            pass
        assert torch.zeros(1, device="cuda").device.type == "cpu"
    with cpu_backend():
        pass
