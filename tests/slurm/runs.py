"""A training run that is launched on the test cluster, and looked at from outside."""

import contextlib
import io
import os
import time
from unittest import mock

import yaml

from megatron_mixcpt.checkpoint import list_checkpoints
from megatron_mixcpt.cli import main
from tests.faults.fleet import metrics
from tests.train.runs import saved_tensors, settings

STEPS = 40
ASK = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=30", "--grace=90")


def mixcpt(cluster, folder, *arguments):
    """Exit code and output of a mixcpt command that is given in `folder` and sees the cluster."""
    output, before = io.StringIO(), os.getcwd()
    os.chdir(folder)
    environment = cluster.environment | {"OMP_NUM_THREADS": "1", "MIXCPT_DEVICE": "cpu"}
    try:
        with mock.patch.dict(os.environ, environment):
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = main([*arguments])
    finally:
        os.chdir(before)
    return code, output.getvalue()


def write_run(mix, folder, global_batch_size=4, **sections):
    """Configuration of a run of STEPS steps over two ranks in `folder`/run; returns its path."""
    train = {"steps": STEPS, "micro_batch_size": 1, "global_batch_size": global_batch_size}
    sections = {"parallel": {"tensor": 2}, "checkpoint": {"every": 5, "keep": 2}} | sections
    config = folder / "train.yaml"
    config.write_text(yaml.safe_dump(settings(mix, folder / "run", train=train, **sections)))
    return config


class Launched:
    """A job of `mixcpt launch CONFIG`, CONFIG from write_run."""

    def __init__(self, cluster, config, *options):
        self.cluster, self.config, self.options = cluster, config, (*ASK, *options)
        self.run_dir = config.parent / "run"
        code, output = self.launch()
        assert code == 0, output
        self.job = int(output.split()[1].rstrip(":"))

    def launch(self):
        return mixcpt(self.cluster, self.config.parent, "launch", str(self.config), *self.options)

    def steps(self):
        return max(metrics(self.run_dir, "train/loss"), default=0)

    def until(self, condition, patience=180):
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def logs(self):
        logs = sorted((self.run_dir / "logs").glob("*.log"))
        return f"{self.cluster.job(self.job)}\n" + "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)

    def log(self):
        """Of the batch script."""
        return (self.run_dir / "logs" / f"{self.job}.log").read_text()

    def rank_log(self, rank):
        return (self.run_dir / "logs" / f"{self.job}-rank_{rank:05d}.log").read_text()

    def ends_well(self):
        state = self.cluster.wait_for(self.job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")["JobState"]
        assert state == "COMPLETED", self.logs()

    def restarts(self):
        return int(self.cluster.job(self.job)["Restarts"])


def outcome(run_dir):
    """Losses by step, and every tensor of the last checkpoint."""
    return metrics(run_dir, "train/loss"), saved_tensors(list_checkpoints(run_dir / "checkpoints")[0])
