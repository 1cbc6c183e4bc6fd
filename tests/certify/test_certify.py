"""What is right is certified, in all its layouts; the command writes a certificate, or says what is off."""

import dataclasses
import json

import pytest
import yaml

from megatron_mixcpt.architecture.architecture import Architecture, RopeScaling
from megatron_mixcpt.certify import certify as command
from megatron_mixcpt.certify import trial
from megatron_mixcpt.certify.axes import variants, whole_run
from megatron_mixcpt.certify.compare import Deviation
from megatron_mixcpt.certify.sample import small_vocabulary
from megatron_mixcpt.certify.trial import judged
from megatron_mixcpt.cli import main
from megatron_mixcpt.convert.certificate import FILE_NAME, read_certificate
from megatron_mixcpt.errors import MixcptError
from tests.helpers.certifying import computed, posed, with_fault
from tests.helpers.corpus import add_pairs, write_mix
from tests.train.runs import settings

QWEN2 = Architecture(4, 96, 192, 6, 2, 16, 250, model_type="qwen2", qkv_bias=True)
QWEN3 = dataclasses.replace(QWEN2, model_type="qwen3", qkv_bias=False, qk_norm=True, num_query_groups=1)
MISTRAL = dataclasses.replace(QWEN2, model_type="mistral", qkv_bias=False, sliding_window=16)
LLAMA3 = dataclasses.replace(
    QWEN2,
    model_type="llama",
    qkv_bias=False,
    tie_word_embeddings=True,
    rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=64),
)
TRAIN = {"micro_batch_size": 1, "global_batch_size": 4}
DPO = {"loss": {"target": "none", "by_kind": {}}, "train": TRAIN}
RIGHT = {
    "tensor, fused head": {
        "arch": QWEN2,
        "parallel": {"tensor": 2, "sequence": True},
        "loss": {"fuse_lm_head": True, "target": "mft"},
        "train": TRAIN,
    },
    "more tensor ranks than query groups": {
        "arch": QWEN3,
        "parallel": {"tensor": 2},
        "loss": {"target": "plain", "temperature": 2.0, "normalize": False},
        "train": TRAIN,
    },
    "interleaved pipeline": {
        "arch": LLAMA3,
        "parallel": {"pipeline": 2, "interleave": 2},
        "train": {**TRAIN, "recompute": "full"},
    },
    "context": {"arch": MISTRAL, "parallel": {"context": 2}, "train": {**TRAIN, "recompute": "attention"}},
    "distributed optimizer": {
        "data": 2,
        "train": {**TRAIN, "distributed_optimizer": True, "overlap_grad_reduce": True, "schedule": "wsd"},
    },
    "alora": {
        "arch": MISTRAL,
        "parallel": {"tensor": 2, "sequence": True},
        "adapter": {"method": "alora", "rank": 4},
        "teacher": {"source": "adapter_off"},
        "train": TRAIN,
    },
    "lora on some layers": {
        "parallel": {"pipeline": 2},
        "adapter": {"method": "lora", "rank": 4, "targets": ["q_proj", "down_proj"]},
        "train": TRAIN,
    },
    "cached, a budget of forgetting": {
        "parallel": {"context": 2},
        "teacher": {"source": "cached", "cache": "cache"},
        "loss": {"target": "mft", "temperature": 2.0},
        "forget": {"budget": 0.1},
        "train": TRAIN,
    },
    "cached, adapter": {
        "parallel": {"tensor": 2},
        "teacher": {"source": "cached", "cache": "cache"},
        "adapter": {"method": "lora", "rank": 4},
        "train": TRAIN,
    },
    "deepspeed, uneven stages": {
        "parallel": {"pipeline": 2, "layers_per_stage": [3, 1]},
        "teacher": {"source": "deepspeed", "hf": "teacher", "offload": "cpu"},
        "train": TRAIN,
    },
    "sft": {"align": {"method": "sft"}, "loss": {"by_kind": {}, "target": "none"}, "train": TRAIN},
    "dpo": {"parallel": {"tensor": 2}, "align": {"method": "dpo", "label_smoothing": 0.1}, **DPO},
    "ipo": {
        "parallel": {"context": 2},
        "align": {"method": "dpo", "loss": "ipo", "length_normalized": True},
        **DPO,
    },
}


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """With preference pairs in its second source."""
    path = write_mix(tmp_path_factory.mktemp("certify") / "data", seq_length=64, train=12)
    add_pairs(path)
    return path


@pytest.mark.distributed
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_within_its_bounds_in_fp32_and_bf16(tmp_path, mix, name):
    problem = posed(tmp_path / "posed", mix, **RIGHT[name])
    (problem,) = computed(problem, ["nothing"], tmp_path / "ranks").values()
    for dtype in ("fp32", "bf16"):
        deviations = judged(problem, whole_run(problem, dtype))
        assert [d.told() for d in deviations if d.is_off] == []
        kinds = {d.what for d in deviations}
        assert kinds >= {"samples", "losses", "gradient", "norm", "weights"}
        assert ("teacher" in kinds) == (name != "sft")


def config_file(folder, mix, **sections):
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(settings(mix, folder / "run", **sections)))
    return str(path)


@pytest.mark.distributed
def test_the_command_certifies_a_grid_of_four(tmp_path, mix, capfd):
    train = {"steps": 100, "micro_batch_size": 1, "global_batch_size": 64, "dtype": "bf16"}
    path = config_file(tmp_path, mix, train=train, parallel={"tensor": 2, "pipeline": 2, "sequence": True})
    assert main(["certify", path, "--nproc", "4", "--device", "cpu"]) == 0
    out, _ = capfd.readouterr()
    assert "tensor 2 x pipeline 2 x context 1 x data 1 = 4 processes on cpu" in out
    assert "are within their bounds" in out
    found = read_certificate(tmp_path / "run")
    assert found.ranks == 4 and found.device == "cpu" and {row["dtype"] for row in found.measured} == {"fp32", "bf16"}
    assert all(row["error"] <= row["bound"] for row in found.measured)
    assert "Certificate" in (tmp_path / "run" / "certify.html").read_text()


@pytest.mark.distributed
def test_what_is_off_is_exit_code_3_and_leaves_no_certificate(tmp_path, mix, monkeypatch, capsys):
    path = config_file(tmp_path, mix, train=TRAIN, parallel={"tensor": 2, "sequence": True})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE_NAME).write_text(json.dumps({"format": "of other settings"}))
    fault = "gradients of norms are not summed over the sequence"
    monkeypatch.setattr(command, "on_this_machine", with_fault(fault))
    assert main(["certify", path, "--nproc", "2", "--device", "cpu", "--out", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().err
    assert "it appears with parallel.sequence" in told
    assert "gradient of model.layers.0.input_layernorm.weight" in told and "gradient of model.layers.0.mlp" not in told
    assert not (tmp_path / "out" / FILE_NAME).exists()
    assert "it appears with parallel.sequence" in (tmp_path / "out" / "certify.md").read_text()


def test_what_no_oracle_can_foretell_is_refused_by_name(tmp_path, mix, capsys):
    path = config_file(tmp_path, mix, adapter={"method": "lora", "rank": 4, "dropout": 0.1}, train=TRAIN)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE_NAME).write_text("a certificate of other settings")
    for words in (["certify", path], ["launch", path, "--certify", "--dry-run", "--nodes", "1"]):
        assert main(words) == 2
        assert "adapter.dropout=0" in capsys.readouterr().err
    assert (tmp_path / "run" / FILE_NAME).read_text() == "a certificate of other settings"


def test_what_the_run_itself_refuses_is_refused(tmp_path, mix, capsys):
    path = config_file(tmp_path, mix)
    assert main(["certify", path, "--nproc", "3", "parallel.tensor=2"]) == 2
    assert "not 3" in capsys.readouterr().err
    assert main(["certify", path, "--nproc", "0"]) == 2
    assert "--nproc 0" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["certify", path, "--out", str(tmp_path / "file" / "below")]) == 2
    assert f"--out {tmp_path / 'file' / 'below'}: Not a directory" in capsys.readouterr().err
    assert main(["certify", path, "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("vocab_size", "tensor"), [(250, 2), (128256, 8), (151936, 4), (512, 2)])
def test_the_small_vocabulary_leaves_the_padding_of_the_real_one(vocab_size, tensor):
    arch = dataclasses.replace(QWEN2, vocab_size=vocab_size)
    size = small_vocabulary(700, arch, tensor)
    small = dataclasses.replace(arch, vocab_size=size)
    assert size >= 700
    assert small.padded_vocab_size(tensor) - size == arch.padded_vocab_size(tensor) - vocab_size


def test_uneven_stages_are_one_axis(tmp_path, mix):
    problem = posed(tmp_path / "posed", mix, parallel={"pipeline": 2, "layers_per_stage": [3, 1]}, train=TRAIN)
    names = [variant.name for variant in variants(problem, "fp32")]
    assert "parallel.layers_per_stage" in names and "parallel.interleave" not in names


def test_what_is_off_is_told_also_where_its_cause_cannot_be_found(tmp_path, mix, monkeypatch):
    problem = posed(tmp_path / "posed", mix, parallel={"tensor": 2}, train=TRAIN)
    off = Deviation("gradient", "model.norm.weight", 0, 1.0, 0.1)
    calls = []

    def run(folder, ranks):
        calls.append(ranks)
        if len(calls) == 2:
            raise MixcptError("a variant's ranks failed")

    monkeypatch.setattr(trial, "judged", lambda problem, variant: [off])
    outcomes = trial.try_all(problem, run)
    assert [outcome.cause for outcome in outcomes] == [
        "what brings it in could not be found: a variant's ranks failed"
    ] * len(outcomes)
