"""checkpoint.json: what is written is what is read, in every format there was."""

import json
from pathlib import Path

import pytest

from megatron_mixcpt.architecture.architecture import PRESETS, RopeScaling
from megatron_mixcpt.checkpoint.info import CheckpointInfo, read_info, render_info
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.model.stage import Start
from tests.helpers.checkpoints import checkpoint_info

STORED = Path(__file__).parent / "stored"


def write(folder, content):
    (folder / "checkpoint.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "info",
    [
        checkpoint_info(7, start=Start("weights", "adapter"), wandb_id="abc", validation_before={"facts": 1.5}),
        checkpoint_info(0, start=Start()),
        CheckpointInfo(0, PRESETS["small"], source="Llama"),
        CheckpointInfo(3, PRESETS["tiny"], adapter=AdapterConfig(method="alora", rank=8, heads=2)),
        CheckpointInfo(3, PRESETS["tiny"].__class__(1, 8, 8, 2, 1, 4, 10, rope_scaling=RopeScaling("linear", 2.0))),
    ],
)
def test_what_is_written_is_read(tmp_path, info):
    assert read_info(write(tmp_path, render_info(info))) == info


def test_entries_that_an_earlier_version_did_not_write_are_unknown(tmp_path):
    content = render_info(checkpoint_info(7))
    later = ("format", "version", "kind", "steps", "validated", "validation_before", "wandb_id", "config_hash")
    for key in (*later, "data_fingerprint", "start", "adapter_start"):
        del content[key]
    info = read_info(write(tmp_path, content))
    assert info.step == 7 and info.version == "unknown" and info.training.seq_length == 32
    assert {info.training.kind, info.training.steps, info.training.validated, info.training.start} == {None}


def test_where_an_adapter_once_started_is_no_part_of_what_it_is(tmp_path):
    content = render_info(checkpoint_info(7)) | {"adapter": {"method": "lora", "init": "somewhere"}}
    assert read_info(write(tmp_path, content)).adapter == AdapterConfig(method="lora")


def test_a_stored_description_of_format_1_is_read():
    info = read_info(STORED / "format_1" / "step_00000002")
    assert (info.step, info.optimizer_step, info.adapter, info.source) == (2, 2, None, None)
    assert info.training.tokens_by_source == {"facts": 278, "tasks": 108} and info.training.start == Start()
    assert info.training.layout["world_size"] == 2 and info.architecture.vocab_size == 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "mixcpt-checkpoint/99"}, "'mixcpt-checkpoint/99', this version reads"),
        ({"step": None}, "step"),
        ({"architecture": {"layers": 3}}, "architecture.num_layers"),
        ({"guard": 3}, "training.guard"),
        ({"adapter": {"method": "prefix"}}, "adapter.method"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(VerificationError, match=message):
        read_info(write(tmp_path, render_info(checkpoint_info(7)) | change))


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_what_is_no_description_is_refused(tmp_path, text):
    (tmp_path / "checkpoint.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(VerificationError, match=r"checkpoint\.json"):
        read_info(tmp_path)
