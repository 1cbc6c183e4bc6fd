"""Checkpoints of experts over ranks: any layout from any other, with every bit of weights and optimizer state."""

import os

import pytest
import torch

from megatron_mixcpt.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from megatron_mixcpt.checkpoint.optimizer_state import optimizer_tensors
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.train.setup import build
from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.model.families import make
from tests.train.runs import grid_of, saved_tensors, settings

SHARDED = {"distributed_optimizer": True}
LAYOUTS = [  # each reads what the one before has written, the first what one process has
    {"parallel": {"tensor": 2, "expert": 2}},
    {"parallel": {"pipeline": 2, "expert": 2}, "train": SHARDED},
    {"parallel": {"expert": 2}, "train": SHARDED},
    {"parallel": {"expert": 2}},
    {"parallel": {"tensor": 2}, "train": SHARDED},
    {"parallel": {"context": 2, "expert": 4}, "train": SHARDED},
]


def write(rank, world_size, values, target):
    """A checkpoint whose every number is another one, of weights and of optimizer state."""
    config = validate(Config, values, "test")
    with grid_of(config) as state:
        parts = build(config, state)
        generator = torch.Generator().manual_seed(1)
        for held in optimizer_tensors(parts.optimizer):
            held.values.copy_(torch.rand(held.values.shape, generator=generator))
        save_checkpoint(target, 1, parts.model, parts.optimizer)


def pass_on(rank, world_size, runs, source):
    for port, values, target in runs:
        os.environ["MASTER_PORT"] = str(port)
        config = validate(Config, values, "test")
        with grid_of(config) as state:
            parts = build(config, state)
            load_checkpoint(source, parts.model, parts.optimizer)
            source = save_checkpoint(target, 1, parts.model, parts.optimizer)


LORA = {"adapter": {"method": "lora", "rank": 3, "targets": ["o_proj", "w?"]}, "teacher": {"source": "adapter_off"}}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("trained", "layouts"), [({}, LAYOUTS), (LORA, LAYOUTS[:4])], ids=["all weights", "lora on experts"]
)
def test_every_bit_goes_from_any_layout_into_any_other(tmp_path, trained, layouts):
    make("mixtral", tmp_path / "model", vocab_size=256, num_hidden_layers=2)
    mix = write_mix(tmp_path / "data")

    def values(**sections):
        train = {"dtype": "bf16"} | sections.pop("train", {})
        model = {"preset": None, "hf": str(tmp_path / "model")}
        return settings(mix, tmp_path / "run", model=model, train=train, **trained, **sections)

    run_distributed(write, 1, values(), tmp_path / "one")
    (source,) = list_checkpoints(tmp_path / "one")
    expected = saved_tensors(source)
    assert any("exp_avg_sq" in key and "experts.linear_fc1" in key for key in expected)
    runs = [(free_port(), values(**sections), tmp_path / str(i)) for i, sections in enumerate(layouts)]
    run_distributed(pass_on, 4, runs, source)
    for number, sections in enumerate(layouts):
        (checkpoint,) = list_checkpoints(tmp_path / str(number))
        found = saved_tensors(checkpoint)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            rows = min(len(tensor), len(found[key]))  # vocabulary padding goes by tensor ranks
            assert torch.equal(found[key][:rows], tensor[:rows]), f"{sections}: {key}"
