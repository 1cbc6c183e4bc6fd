"""The example configurations are valid, and the SLURM array gives the bytes of a single run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.config.reader import load_config
from megatron_mixcpt.data_prep.config import Decontaminate, NearDuplicates, PreprocessConfig, SourceConfig, parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
from tests.data_prep.helpers import digests

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "launch" / "configs").glob("preprocess*.yaml"))

# A stand-in for SLURM: runs every task of an array at once, one after the other.
SBATCH = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")]
script, *rest = [word for word in words if not word.startswith("--")]
array = [option for option in options if option.startswith("--array=")][-1].removeprefix("--array=")
first, last = map(int, array.split("-"))
number = len(open({log!r}).readlines()) + 100
open({log!r}, "a").write(" ".join(words) + "\\n")
for task in range(first, last + 1):
    env = dict(os.environ, SLURM_ARRAY_JOB_ID=str(number), SLURM_ARRAY_TASK_ID=str(task), SLURM_CPUS_PER_TASK="1",
               SLURM_ARRAY_TASK_MIN=str(first), SLURM_ARRAY_TASK_MAX=str(last),
               SLURM_ARRAY_TASK_COUNT=str(last - first + 1))
    subprocess.run(["bash", script, *rest], env=env, check=True, stdout=sys.stderr)
print(f"{{number}};cluster")
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_configurations_are_valid(path):
    assert load_config(PreprocessConfig, path, literal=True).sources


def test_every_key_is_documented():
    page = (ROOT / "docs" / "data.md").read_text()
    for model in (PreprocessConfig, SourceConfig, NearDuplicates, Decontaminate):
        missing = [key for key in model.model_fields if f"`{key}`" not in page and f"`{key}:" not in page]
        assert not missing, f"{model.__name__}: {missing}"


def test_a_slurm_array_gives_the_bytes_of_a_single_run(config_values, tmp_path):
    preprocess(parse_config(config_values))
    want = digests(Path(config_values["out"]))
    config = tmp_path / "p.yaml"
    config.write_text(yaml.safe_dump({**config_values, "out": str(tmp_path / "array")}))
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    log.write_text("")
    (tools / "sbatch").write_text(SBATCH.format(python=sys.executable, log=str(log)))
    (tools / "sbatch").chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = [str(ROOT / "launch" / "preprocess.sh"), str(config), "--array=3-5"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tokenize: job 100, assemble and verify: job 101" in done.stdout
    assert "shard 3/3 done" in done.stderr and "verified:" in done.stderr
    assert "--dependency=afterok:100" in log.read_text().splitlines()[1]
    assert digests(tmp_path / "array") == want


def test_a_task_that_is_told_to_stop_goes_back_into_the_queue(tmp_path):
    """SLURM signals the batch shell; the program must get the signal, and exit code 75 must lead to a requeue."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").write_text("#!/bin/bash\ntrap 'exit 75' TERM\ntouch started\nwhile true; do sleep 0.05; done\n")
    (tools / "scontrol").write_text('#!/bin/bash\necho "$@" > requeued\n')
    (tools / "squeue").write_text("#!/bin/bash\necho RUNNING\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    env.update(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_MIN="1", SLURM_ARRAY_TASK_MAX="3")
    env.update(SLURM_ARRAY_TASK_COUNT="3", SLURM_CPUS_PER_TASK="1")
    command = ["bash", str(ROOT / "launch" / "preprocess.sbatch"), "c.yaml", "tokenize"]
    process = subprocess.Popen(command, env=env, cwd=tmp_path)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "requeued").read_text().strip() == "requeue 7_2"


def test_an_array_with_gaps_is_refused(tmp_path):
    """Its tasks would take shards that nobody else knows of, and some would be nobody's."""
    task = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    env = os.environ | task | {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1", "PYTHON": "false"}
    command = ["bash", str(ROOT / "launch" / "preprocess.sbatch"), "c.yaml", "tokenize"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "give all of them, as 1-16" in done.stdout
