"""Adapters train alike on every process grid, and the base model inside them is the frozen copy bit for bit."""

import numpy as np
import pytest

from megatron_mixcpt.adapters.files import write_directory
from megatron_mixcpt.architecture.architecture import PRESETS
from megatron_mixcpt.config import AdapterConfig
from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.model.adapter_models import random_tensors
from tests.train.runs import run_all, settings

pytestmark = pytest.mark.slow

ADAPTERS = {"lora": {"method": "lora", "rank": 6}, "alora": {"method": "alora", "rank": 8, "heads": 2}}
TWO = {
    "TP2": {"parallel": {"tensor": 2}},
    "TP2+SP": {"parallel": {"tensor": 2, "sequence": True}},
    "PP2": {"parallel": {"pipeline": 2}},
    "TP2+SP recompute": {"parallel": {"tensor": 2, "sequence": True}, "train": {"recompute": "full"}},
    "PP2 recompute": {"parallel": {"pipeline": 2}, "train": {"recompute": "full"}},
    "DP2 distributed optimizer": {"train": {"distributed_optimizer": True}},
}
FOUR = {
    "TP2xPP2 SP": {"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}},
    "TP4, more than query groups": {"parallel": {"tensor": 4}},
}
OFF = {
    "one": (1, {}),
    "TP2+SP": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "PP2": (2, {"parallel": {"pipeline": 2}}),
    "PP2 fused head": (2, {"parallel": {"pipeline": 2}, "loss": {"fuse_lm_head": True}}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By name; `<method>, <layout>` starts from adapters with random values, `<source>, <layout>` from fresh ones."""
    folder = tmp_path_factory.mktemp("adapters")
    mix = write_mix(folder / "data")
    runs = {1: {}, 2: {}, 4: {}}

    def add(world_size, name, adapter, source, sections):
        values = {"loss": {}} | sections | {"teacher": {"source": source}, "adapter": adapter}
        # Adam divides by the root of tiny moments; with this it shows no rounding error of a gradient near 0 in full.
        values["train"] = {"steps": 3, "adam_eps": 1e-5, "lr": 3e-4} | values.get("train", {})
        runs[world_size][name] = settings(mix, folder / name, **values)

    for method, values in ADAPTERS.items():
        arch = AdapterConfig(**values)
        start = folder / f"{method}-start"
        start.mkdir()
        whole = random_tensors(PRESETS["tiny"], arch, scale=0.1)
        write_directory(start, PRESETS["tiny"], arch, whole, None)
        for world_size, layouts in ((1, {"one": {}}), (2, TWO), (4, FOUR)):
            for name, sections in layouts.items():
                add(world_size, f"{method}, {name}", values | {"init": str(start)}, "adapter_off", sections)
    for name, (world_size, sections) in OFF.items():
        for source in ("initial", "adapter_off"):
            add(world_size, f"{source}, {name}", ADAPTERS["alora"], source, sections)
    found = {}
    for world_size, chosen in runs.items():
        port = free_port()
        chosen = {name: (port, values) for name, values in chosen.items()}
        found |= run_distributed(run_all, world_size, chosen, timeout=400)[0]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [*TWO, *FOUR])
@pytest.mark.parametrize("method", ADAPTERS)
def test_layout_trains_adapters_like_one_process(results, method, layout):
    one, other = results[f"{method}, one"], results[f"{method}, {layout}"]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6)
    np.testing.assert_allclose(other["norms"], one["norms"], rtol=1e-5)
    assert other["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(other["weights"][name], weight, atol=1e-5, rtol=0, err_msg=name)
    for name, gradient in other["gradients"].items():
        scale = np.abs(one["gradients"][name]).max()
        assert scale > 0, f"{name} has no gradient"
        np.testing.assert_allclose(gradient, one["gradients"][name], atol=1e-6 * max(scale, 1.0), rtol=0, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", OFF)
def test_switching_the_adapters_off_teaches_as_the_initial_weights_do_bit_for_bit(results, layout):
    copy, off = results[f"initial, {layout}"], results[f"adapter_off, {layout}"]
    assert off["losses"] == copy["losses"] and off["norms"] == copy["norms"]
    assert all(np.array_equal(off["weights"][name], weight) for name, weight in copy["weights"].items())


def test_adapters_learn(results):
    for method in ADAPTERS:
        assert results[f"{method}, one"]["losses"][-1] < results[f"{method}, one"]["losses"][0]
