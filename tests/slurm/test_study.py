"""A study on two nodes of a real SLURM: they share its runs, and stop and go on with the job."""

import json

import pytest
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.slurm.chain import chain_jobs
from tests.faults.fleet import metrics
from tests.helpers.studies import study_file, write_material
from tests.slurm.runs import ASK, mixcpt


def test_two_nodes_share_a_study_and_make_each_run_once(cluster, tmp_path):
    path = study_file(write_material(tmp_path / "material"), tmp_path, lr=[1e-2], seeds=[1], average=[])
    code, output = mixcpt(cluster, tmp_path, "launch", path, *ASK, "--nodes=2")
    assert code == 0, output
    job, logs = int(output.split()[1].rstrip(":")), tmp_path / "out" / "logs"
    state = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")["JobState"]
    said = "\n".join(log.read_text() for log in sorted(logs.glob("*.log")))
    assert state == "COMPLETED", said
    content = json.loads((tmp_path / "out" / "study.json").read_text())
    assert content["complete"] and len(content["runs"]) == 2
    for folder in (tmp_path / "out" / "cells").iterdir():
        assert sorted(metrics(folder / "run", "train/loss")) == [1, 2, 3, 4]
        assert not metrics(folder / "run", "run/resumed")
    # One run at a time on a node: they overlap because there are two.
    begun, measured = (
        [path.stat().st_mtime for path in tmp_path.glob(f"out/cells/*/{name}")]
        for name in ("train.yaml", "measured-*.json")
    )
    assert len(begun) == len(measured) == 2 and max(begun) < min(measured)


def test_a_node_makes_as_many_runs_at_a_time_as_its_ranks_allow(tmp_path, capsys):
    material = write_material(tmp_path / "material")
    path = study_file(material, tmp_path, nproc=2, arms={"ce": {"train.micro_batch_size": 2}})
    options = ["launch", path, "--nodes=3", "--gpus-per-node=8", "--dry-run"]
    assert main(options) == 0
    script = capsys.readouterr().out
    assert "--jobs 4" in script and "#SBATCH --ntasks-per-node=1\n" in script and "#SBATCH --nodes=3\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script and not (tmp_path / "out").exists()
    chain = tmp_path / "chain.yaml"
    stage = {"name": "methods", "command": f"study {path}", "nodes": 3, "gpus_per_node": 8}
    chain.write_text(yaml.safe_dump({"out": str(tmp_path / "chain"), "stages": [stage]}))
    (job,) = chain_jobs(str(chain), {})
    assert job.stage == "methods" and "--jobs 4" in job.script and "#SBATCH --ntasks-per-node=1\n" in job.script
    chain.write_text(yaml.safe_dump({"out": "chain", "stages": [stage | {"command": f"study {path} --jobs 2"}]}))
    with pytest.raises(ConfigError, match=r"stage methods: .* how many runs at a time"):
        chain_jobs(str(chain), {})
    assert main([*options, "--gpus-per-node=1"]) == 2
    assert "nproc: a run has 2 ranks" in capsys.readouterr().err
    assert main([*options, "--certify"]) == 2
    assert "is a study" in capsys.readouterr().err
