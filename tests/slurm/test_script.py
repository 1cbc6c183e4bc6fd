"""The batch script's own work on a real SLURM, with a stand-in for the ranks: signals, exit codes, requeues, limits."""

import subprocess
import time
from unittest import mock

import pytest

from megatron_mixcpt.slurm import agent
from megatron_mixcpt.slurm.render import render, template

# In the place of `python -m megatron_mixcpt.cli COMMAND`: does what the command says.
RANK = """#!/bin/bash
shift 2
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT, $*"
trap 'echo saved; exit 75' USR1 TERM
case $1 in
fail) exit "$2" ;;
wait) touch "started-$RANK"; while true; do sleep 0.1; done ;;
unready) trap - USR1 TERM; touch "started-$RANK"; while true; do sleep 0.1; done ;;
esac
"""


class Script:
    """launch/mixcpt.sbatch, submitted in a folder."""

    def __init__(self, cluster, folder, *command, nodes=2, **settings):
        self.cluster, self.folder = cluster, folder
        rank = folder / "python"
        rank.write_text(RANK)
        rank.chmod(0o755)
        options = {"gpus-per-node": None, "cpus-per-task": "1", "ntasks-per-node": "1", "nodes": str(nodes)}
        options |= {"output": "%j.log", "time": "5"}
        settings = {"PYTHON": str(rank), "SAVE_SECONDS": "20"} | settings
        text = render(template("mixcpt.sbatch"), options, settings, command)
        (folder / "job.sbatch").write_text(text)
        self.job = cluster.call("sbatch", "--parsable", "job.sbatch", cwd=folder).strip()

    def until_started(self, nodes=2):
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("started-*"))) < nodes:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def log(self):
        path = self.folder / f"{self.job}.log"
        return path.read_text() if path.exists() else ""


def test_ranks_get_their_place_and_a_log_each(cluster, tmp_path):
    script = Script(cluster, tmp_path, "done", "with space")
    cluster.wait_for(script.job, "COMPLETED")
    port = 20000 + int(script.job)
    for rank in range(2):
        log = (tmp_path / "logs" / f"{script.job}-rank_{rank:05d}.log").read_text()
        assert log == f"rank {rank} of 2, local 0, 127.0.0.1:{port}, done with space\n"


def test_modules_may_read_variables_that_nobody_has_set(cluster, tmp_path):
    module = {"BASH_FUNC_module%%": '() { echo "$*$NOT_SET_ANYWHERE" >modules; }'}  # as sites define it
    with mock.patch.dict(cluster.environment, module):
        script = Script(cluster, tmp_path, "done", nodes=1, MODULES="cuda/12.8 gcc")
    cluster.wait_for(script.job, "COMPLETED")
    assert (tmp_path / "modules").read_text() == "load cuda/12.8 gcc\n"


@pytest.mark.parametrize(("command", "limit"), [("wait", 1), ("unready", 0)])
def test_a_stop_leads_back_into_the_queue_until_the_limit(cluster, tmp_path, command, limit):
    """`unready`: the signal comes before the program has a handler, and ends it."""
    script = Script(cluster, tmp_path, command, MAX_RESTARTS=str(limit))
    for _ in range(limit + 1):
        script.until_started()
        for mark in tmp_path.glob("started-*"):
            mark.unlink()
        cluster.call("scancel", "--signal=USR1", "--batch", script.job)
    job = cluster.wait_for(script.job, "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("75:0", str(limit)), script.log()
    assert script.log().count("stopped on request; requeued") == limit
    assert f"not requeued: restarted {limit} times (MAX_RESTARTS={limit})" in script.log()


def test_a_stage_that_goes_back_into_the_queue_keeps_the_next_one_waiting(cluster, tmp_path):
    script = Script(cluster, tmp_path, "wait")
    after = ["--dependency=afterok:" + script.job, "--kill-on-invalid-dep=yes"]
    follower = cluster.call("sbatch", "--parsable", *after, "--wrap=true", cwd=tmp_path).strip()
    script.until_started()
    cluster.call("scancel", "--signal=USR1", "--batch", script.job)
    cluster.wait_for(script.job, "PENDING")
    assert cluster.job(follower)["JobState"] == "PENDING"
    cluster.call("scancel", script.job)
    cluster.wait_for(follower, "CANCELLED")


def test_a_cancelled_job_is_not_requeued(cluster, tmp_path):
    script = Script(cluster, tmp_path, "wait")
    script.until_started()
    cluster.call("scancel", script.job)
    cluster.wait_for(script.job, "CANCELLED")
    deadline = time.monotonic() + 60
    while "stopped on request" not in script.log():
        assert time.monotonic() < deadline, script.log()
        time.sleep(0.05)
    assert "requeued" not in script.log() and cluster.job(script.job)["Restarts"] == "0"
    assert "saved" in (tmp_path / "logs" / f"{script.job}-rank_00001.log").read_text()


@pytest.mark.parametrize("code", [1, 2])
def test_a_failure_keeps_its_exit_code_and_says_where_to_look(cluster, tmp_path, code):
    script = Script(cluster, tmp_path, "fail", str(code))
    assert cluster.wait_for(script.job, "FAILED")["ExitCode"] == f"{code}:0"
    assert f"failed with exit code {code}: " in script.log() and "requeued" not in script.log()


def test_ranks_that_fail_because_a_node_is_lost_lead_back_into_the_queue(cluster, tmp_path):
    """Long before SLURM notices: the ranks of the other nodes fail, and the lost node does not answer."""
    tools = tmp_path / "bin"
    tools.mkdir()
    # The node answers in truth, so its silence is played: the check alone fails.
    srun = cluster.call("bash", "-c", "command -v srun").strip()
    (tools / "srun").write_text(f'#!/bin/bash\n[[ "$*" != *--overlap* ]] || exit 1\nexec {srun} "$@"\n')
    (tools / "srun").chmod(0o755)
    environment = cluster.environment
    cluster.environment = environment | {"PATH": f"{tools}:{environment['PATH']}"}
    try:
        script = Script(cluster, tmp_path, "fail", "1", MAX_RESTARTS="1")
        assert cluster.wait_for(script.job, "FAILED")["Restarts"] == "1", script.log()
    finally:
        cluster.environment = environment
    assert "a node does not answer; requeued" in script.log()


def test_an_agent_that_could_not_wait_for_a_save_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(agent.metadata, "version", lambda name: "2.11.0+cu130")
    assert agent.main() == 2
    assert "needs torch 2.12 or newer, this is 2.11.0+cu130: take srun" in capsys.readouterr().err


def test_a_container_gets_the_working_directory_and_further_mounts(tmp_path):
    """pyxis' options, as srun gets them."""
    tools = tmp_path / "bin"
    tools.mkdir()
    stubs = {
        "srun": 'printf "%s\\n" "$@" > srun.arguments',
        "scontrol": "echo localhost",
        "module": "exit 0",
    }
    for name, body in stubs.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    settings = {"CONTAINER": "nvcr.io#nvidia/pytorch:25.06-py3", "CONTAINER_MOUNTS": "/data:/data", "PYTHON": "python"}
    (tmp_path / "job.sbatch").write_text(render(template("mixcpt.sbatch"), {}, settings, ["train", "c.yaml"]))
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    environment = {"PATH": f"{tools}:/usr/bin:/bin", **variables}
    done = subprocess.run(["bash", "job.sbatch"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "srun.arguments").read_text().splitlines()
    assert "--container-image=nvcr.io#nvidia/pytorch:25.06-py3" in arguments
    assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data" in arguments
    assert f"--container-workdir={tmp_path}" in arguments
    assert arguments[-3:] == ["python", "train", "c.yaml"]
