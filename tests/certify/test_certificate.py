"""Whom a certificate speaks for, where it appears, and what becomes of it when it is damaged."""

import dataclasses

import pytest
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.convert.certificate import (
    FILE_NAME,
    Certificate,
    current_versions,
    features_of,
    read_certificate,
    recorded_versions,
    settings_of,
)
from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.observe.provenance import record_provenance
from megatron_mixcpt.slurm.jobs import certify_job, command_jobs
from megatron_mixcpt.slurm.resources import Resources
from tests.helpers.corpus import write_mix
from tests.helpers.nano import NANO
from tests.train.runs import settings


def config_of(**sections):
    return validate(Config, settings("mix.json", "run", **sections), "test")


def certificate(config, ranks=8):
    grid = {"tensor": 1, "pipeline": 1, "data": 2, "context": 1}
    return Certificate(
        settings_of(config), features_of(NANO), ranks, grid, current_versions(), "cpu", [], 144, ["adapter.dropout"]
    )


def test_it_speaks_for_the_same_computation_and_no_other():
    config, versions = config_of(), current_versions()
    found = certificate(config)
    assert found.speaks_for(config, NANO, 8, versions)
    same = config_of(train={"steps": 9999, "lr": 3e-6, "seed": 5}, checkpoint={"every": 7}, wandb={"mode": "disabled"})
    assert found.speaks_for(same, NANO, 8, versions)
    budgets = [config_of(forget={"budget": budget}) for budget in (0.1, 0.2)]
    assert certificate(budgets[0]).speaks_for(budgets[1], NANO, 8, versions)
    for other in (
        config_of(parallel={"tensor": 2}),
        config_of(train={"dtype": "bf16"}),
        config_of(train={"recompute": "full"}),
        config_of(train={"distributed_optimizer": True}),
        config_of(loss={"fuse_lm_head": True}),
        config_of(loss={"temperature": 2.0}),
        config_of(adapter={"method": "lora"}),
        config_of(optimizer={"offload": "cpu"}),
        config_of(forget={"budget": 0.1}),
    ):
        assert not found.speaks_for(other, NANO, 8, versions)
    assert not found.speaks_for(config, NANO, 16, versions)
    assert not found.speaks_for(config, NANO, 8, {**versions, "torch": "0.1"})
    assert not found.speaks_for(config, dataclasses.replace(NANO, qkv_bias=True), 8, versions)


def test_it_is_read_back_and_refused_when_damaged(tmp_path):
    found = certificate(config_of())
    assert read_certificate(tmp_path) is None
    path = found.write(tmp_path)
    assert path == tmp_path / FILE_NAME and read_certificate(tmp_path) == found
    path.write_text(path.read_text().replace("mixcpt-certificate/1", "mixcpt-certificate/9"))
    with pytest.raises(VerificationError, match=r"certificate\.json"):
        read_certificate(tmp_path)


def test_the_versions_of_a_run_are_those_it_recorded(tmp_path):
    assert recorded_versions(tmp_path) == {}
    record_provenance(tmp_path / "provenance")
    assert recorded_versions(tmp_path) == current_versions()


def test_launch_submits_it_before_the_run_and_runs_it_on_the_same_settings(tmp_path, capsys):
    mix = write_mix(tmp_path / "data", seq_length=16, vocab_size=120)
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings(mix, tmp_path / "run", train={"global_batch_size": 16})))
    assert main(["launch", str(config), "--certify", "--nodes", "2", "--gpus-per-node", "4", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert [row[0] for row in rows] == ["certify", "train"] and rows[1][-3] == "certify"
    folder, words = tmp_path / "run" / "launch", ["train", str(config)]
    assert f"certify {folder}/certify.yaml --nproc 8" in out and f"train {folder}/train.yaml" in out
    (trains,), certifies = command_jobs("train", words, Resources(), tmp_path), certify_job(words, Resources())
    assert [*certifies.files.values()] == [*trains.files.values()]
    assert "afterok:JOB-OF-certify" in err
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": "x", "stages": [{"name": "a", "command": f"certify {config} --nproc 8"}]}))
    assert main(["launch", str(chain), "--certify", "--dry-run"]) == 2
    assert "a stage of its own" in capsys.readouterr().err
    assert main(["launch", str(chain), "--gpus-per-node", "4", "--dry-run"]) == 0
