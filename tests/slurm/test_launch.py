"""What `mixcpt launch` writes and refuses; the scripts are accepted by bash, shellcheck and SLURM."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.checkpoint.store import commit, new_directory
from megatron_mixcpt.cli import main
from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.slurm.chain import chain_jobs
from megatron_mixcpt.slurm.jobs import command_jobs
from megatron_mixcpt.slurm.render import render, template
from megatron_mixcpt.slurm.resources import Resources, seconds
from tests.helpers.checkpoints import checkpoint_info
from tests.helpers.corpus import write_mix
from tests.slurm.runs import STEPS, write_run

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sbatch"), *(ROOT / "launch").glob("*.sh")])
EVERYTHING = (
    *(
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=16",
        "--mem=64G",
        "--time=1-12",
        "--partition=gpu",
        "--account=physics",
    ),
    *("--container", "nvcr.io#nvidia/pytorch:25.06-py3", "--container-mounts", "/data:/data", "/scratch:/scratch"),
    *("--modules", "cuda/12.8", "gcc", "--style", "torchrun", "--max-restarts", "3", "--grace=600"),
    *("--python", "/opt/env/bin/python", "--option", "qos=high", "--option", "exclusive"),
)


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("launch-data") / "data", seq_length=16, vocab_size=120)


@pytest.fixture
def config(mix, tmp_path):
    return write_run(mix, tmp_path, global_batch_size=16)


def dry_run(capsys, config, *options):
    assert main(["launch", str(config), *options, "--dry-run"]) == 0
    return capsys.readouterr().out


def options_of(script):
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_templates_are_plain_scripts_that_shellcheck_accepts(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    subprocess.run(["shellcheck", script], check=True)


def test_every_option_ends_up_in_the_script(capsys, config, tmp_path):
    script = dry_run(capsys, config, *EVERYTHING)
    options = options_of(script)
    assert options.pop("job-name").startswith("mixcpt-train-run-")
    assert options == {
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "16",
        "mem": "64G",
        "time": "1-12",
        "output": f"{tmp_path}/run/logs/%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@600",
        "chdir": str(Path.cwd()),
        "partition": "gpu",
        "account": "physics",
        "qos": "high",
        "exclusive": "",
    }
    for line in (
        "PYTHON=/opt/env/bin/python",
        "STYLE=torchrun",
        "MODULES='cuda/12.8 gcc'",
        "CONTAINER='nvcr.io#nvidia/pytorch:25.06-py3'",
        "CONTAINER_MOUNTS=/data:/data,/scratch:/scratch",
        f"LOGS={tmp_path}/run/logs",
        "MAX_RESTARTS=3",
        "SAVE_SECONDS=540",
    ):
        assert any(written.startswith(line) for written in script.splitlines()), line
    assert f"[ $# -gt 0 ] || set -- train {tmp_path}/run/launch/train.yaml" in script
    assert not (tmp_path / "run").exists()


def test_memory_is_asked_for_and_a_dry_run_says_what_it_would_have_done(capsys, config, tmp_path):
    """All of a node's, where nothing is said: the default of a cluster may be a gigabyte."""
    assert main(["launch", str(config), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert options_of(shown.out)["mem"] == "0"
    assert "nothing was submitted" in shown.err
    assert f"sbatch --parsable --dependency=singleton --kill-on-invalid-dep=yes {tmp_path}/run/launch/" in shown.err


CPU = ("--gpus-per-node=0", "--tasks-per-node=4", "--cpus-per-task=2")


@pytest.mark.parametrize(
    "options",
    [(), EVERYTHING, CPU, (*CPU, "run_dir=odd, folder/my, run")],
    ids=("default", "everything", "cpu", "odd names"),
)
def test_rendered_scripts_are_accepted_by_slurm_bash_and_shellcheck(capsys, config, tmp_path, cluster, options):
    script = tmp_path / "job.sbatch"
    script.write_text(dry_run(capsys, config, *options))
    partition = () if "--gpus-per-node=0" in options else ("--partition=gpu", "--account=root")
    cluster.call("sbatch", "--test-only", *partition, str(script))
    (name,) = (line for line in script.read_text().splitlines() if line.startswith("#SBATCH --job-name="))
    assert not {" ", ","} & set(name.removeprefix("#SBATCH ")), "squeue takes a comma for two names"
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nodes=0",), "nodes: Input should be greater than or equal to 1"),
        (("--time=never",), "time 'never': write minutes"),
        (("--time=5",), "time 5 is no longer than the grace of 300 s"),
        (("--option", "=high"), "written KEY=VALUE"),
        (
            ("--gpus-per-node=3",),
            "parallel.pipeline=1 needs a multiple of 2 processes, not 3",
        ),
        (("--gpus-per-node=0", "--tasks-per-node=1"), "needs a multiple of 2 processes, not 1"),
        (("train.lr=-1",), "train.lr: Input should be greater than 0"),
        ((), "there is no sbatch here"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_queued(capsys, config, tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", str(config), *options]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_other_settings_is_refused_before_anything_is_queued(capsys, config, tmp_path):
    parent = tmp_path / "run" / "checkpoints"
    folder = new_directory(parent, 4)
    (folder / "__0_0.distcp").write_bytes(b"weights")
    commit(folder, checkpoint_info(4, tokenizer_hash="of other data"))
    assert main(["launch", str(config), "--dry-run", *CPU]) == 2
    assert "was trained on data of another tokenizer" in capsys.readouterr().err


def test_a_run_at_its_end_is_told_and_not_queued_but_trained_on_where_it_shall_be_longer(
    capsys, config, mix, tmp_path, monkeypatch
):
    folder = new_directory(tmp_path / "run" / "checkpoints", STEPS)
    (folder / "__0_0.distcp").write_bytes(b"weights")
    data = open_mix(str(mix))
    state = {"tokenizer_hash": data.tokenizer_hash, "seq_length": data.seq_length, "global_batch_size": 16}
    commit(folder, checkpoint_info(STEPS, **state))
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", str(config), *CPU]) == 0
    assert f"finished: {STEPS} of {STEPS} steps" in capsys.readouterr().out
    assert main(["launch", str(config), f"train.steps={STEPS + 1}", *CPU]) == 1
    assert "there is no sbatch here" in capsys.readouterr().err


def test_settings_after_an_option_that_takes_several_words_are_settings(capsys, config):
    script = dry_run(capsys, config, *CPU, "--modules", "cuda/12.8", "gcc", "train.seed=7", "run_dir=elsewhere")
    assert "MODULES='cuda/12.8 gcc'" in script and "elsewhere/launch/train.yaml" in script


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("0", math.inf),
        ("UNLIMITED", math.inf),
        ("90", 5400),
        ("90:30", 5430),
        ("12:00:01", 43201),
        ("2-12", 216000),
        ("1-1:30", 91800),
        ("1-0:0:5", 86405),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time, expected):
    assert seconds(time) == expected


def test_settings_keep_their_comment_and_unknown_ones_are_errors():
    text = "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --gpus=8\nA_B=${A_B:-x}  # why\n"
    rendered = render(text, {"nodes": "2", "gpus": None, "mem": "1G"}, {"A_B": "it's"}, ["a b"])
    assert rendered == (
        "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --mem=1G\n[ $# -gt 0 ] || set -- 'a b'\nA_B='it'\"'\"'s'  # why\n"
    )
    with pytest.raises(KeyError, match="C"):
        render(text, {}, {"C": "1"})


def test_defaults_of_the_template_are_those_of_the_options(capsys, config):
    """Who reads the file and who reads `--help` must not learn different things."""
    defaults, shown = Resources(), options_of(template("mixcpt.sbatch"))
    assert shown["nodes"] == str(defaults.nodes) and shown["gpus-per-node"] == str(defaults.gpus_per_node)
    assert shown["cpus-per-task"] == str(defaults.cpus_per_task) and shown["time"] == defaults.time
    assert shown["signal"] == f"B:USR1@{defaults.grace}"
    assert f"MAX_RESTARTS:-{defaults.max_restarts}" in template("mixcpt.sbatch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "train"}, "there are two stages of this name"),
        ({"command": "tarin x.yaml"}, "is no mixcpt command"),
        ({"array": 4}, "array is for `preprocess CONFIG` alone"),
        ({"nodez": 4}, "nodez: unknown key; did you mean nodes?"),
        ({"name": "a b"}, "name: String should match pattern"),
        ({"command": "train {config} train.lr=-1"}, "train.lr: Input should be greater than 0"),
        ({"command": "train {config} --nproc 4"}, "a job takes `train CONFIG [--trust] [key=value ...]`"),
    ],
)
def test_a_wrong_stage_is_named(capsys, config, tmp_path, change, message):
    stages = [
        {"name": "train", "command": f"train {config}"},
        {"name": "last", "command": f"export {tmp_path} --out x"},
    ]
    stages[1] |= {
        key: value.format(config=config) if isinstance(value, str) else value for key, value in change.items()
    }
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "stages": stages}))
    assert main(["launch", str(chain), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_options_of_the_command_line_are_laid_over_a_chain_s_defaults_and_stages_over_both(capsys, mix, tmp_path):
    config = write_run(mix, tmp_path, global_batch_size=60)
    stages = [{"name": "a", "command": f"train {config}", "nodes": 3}, {"name": "b", "command": f"train {config}"}]
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": "out", "defaults": {"nodes": 2, "account": "x"}, "stages": stages}))
    scripts = dry_run(capsys, chain, "--nodes=5", "--partition=gpu").split("#!/bin/bash\n")[1:]
    assert [options_of(script)["nodes"] for script in scripts] == ["3", "5"]
    assert [options_of(script)["ntasks-per-node"] for script in scripts] == ["8", "8"]
    assert {(options_of(script)["account"], options_of(script)["partition"]) for script in scripts} == {("x", "gpu")}
    assert main(["launch", str(chain), "train.lr=1", "--dry-run"]) == 2
    assert "write train.lr=1 into the command of its stage" in capsys.readouterr().err


def test_stages_of_one_run_have_one_name_and_each_its_own_settings(capsys, mix, tmp_path):
    """One name: SLURM never runs two at once (singleton), and `launch` refuses what is in the queue already."""
    config = write_run(mix, tmp_path, global_batch_size=16)
    stages = [{"name": "a", "command": f"train {config}"}, {"name": "b", "command": f"train {config} train.steps=50"}]
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": "out", "stages": stages}))
    jobs = [*chain_jobs(str(chain), {}), *command_jobs("train", ["train", str(config)], Resources(), Path())]
    assert len({job.name for job in jobs}) == 1 and len({job.path for job in jobs}) == 3
    frozen = [next(iter(job.files.items())) for job in jobs]
    assert [yaml.safe_load(text)["train"]["steps"] for _, text in frozen] == [STEPS, 50, STEPS]
    assert all(f"-- train {path}" in job.script for job, (path, _) in zip(jobs, frozen))


def test_further_options_are_laid_over_each_other_one_by_one(tmp_path):
    stage = {"name": "a", "command": "export run --out hf", "options": {"qos": "low"}}
    defaults = {"options": {"constraint": "a100", "qos": "high"}}
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": "out", "defaults": defaults, "stages": [stage]}))
    (job,) = chain_jobs(str(chain), {"options": {"reservation": "r1"}})
    found = options_of(job.script)
    assert (found["constraint"], found["qos"], found["reservation"]) == ("a100", "low", "r1")


def test_an_array_that_preprocesses_has_the_stage_s_environment(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    source = {"name": "s", "kind": "domain", "paths": [str(tmp_path / "text.jsonl")], "weight": 1.0}
    source["text"] = "{text}"
    values = {"tokenizer": "t", "out": str(tmp_path / "data"), "seq_length": 16, "sources": [source]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    stage = {"name": "data", "command": f"preprocess {tmp_path / 'p.yaml'}", "array": 2, "modules": ["x/1", "y"]}
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": "out", "stages": [stage | {"max_restarts": 3}]}))
    for job in chain_jobs(str(chain), {}):
        assert "\nMODULES='x/1 y'" in job.script and "\nMAX_RESTARTS=3" in job.script
        assert f"\nPYTHON={sys.executable}" in job.script


def test_a_run_directory_may_refer_to_a_variable(mix, tmp_path, monkeypatch):
    config = write_run(mix, tmp_path)
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "there"))
    values = yaml.safe_load(config.read_text()) | {"run_dir": "${oc.env:ELSEWHERE}/run"}
    config.write_text(yaml.safe_dump(values))
    for command in ("train", "certify"):
        (job,) = command_jobs(command, [command, str(config)], Resources(), Path())
        assert job.folder == tmp_path / "there" / "run" / "launch"


def test_nothing_is_submitted_where_a_later_job_s_files_cannot_be_written(capsys, mix, tmp_path, monkeypatch):
    config = write_run(mix, tmp_path, global_batch_size=16)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "squeue"):
        (tools / name).write_text(f"#!/bin/bash\ntouch {tmp_path}/{name}-called\n[ {name} = squeue ] || echo 7\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    (tmp_path / "file").write_text("")
    stages = [{"name": "a", "command": f"train {config}"}, {"name": "b", "command": "export run --out hf"}]
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": str(tmp_path / "file" / "below"), "stages": stages}))
    assert main(["launch", str(chain)]) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    assert (tmp_path / "squeue-called").exists() and not (tmp_path / "sbatch-called").exists()


def test_a_command_that_works_in_one_process_gets_one(capsys, tmp_path):
    """And not eight exports into one folder."""
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": "out", "stages": [{"name": "a", "command": "export run --out hf"}]}))
    options = options_of(dry_run(capsys, chain, "--nodes=4", "--gpus-per-node=2"))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("1", "1", "2")


def test_the_dry_run_of_a_chain_shows_ranks_and_every_submission(capsys, mix, tmp_path):
    config = write_run(mix, tmp_path, global_batch_size=16)
    cpu = {"gpus_per_node": 0, "tasks_per_node": 2}
    stages = [{"name": "one", "command": f"train {config}"}, {"name": "two", "command": f"train {config}"}]
    chain = tmp_path / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": "out", "defaults": cpu, "stages": stages}))
    assert main(["launch", str(chain), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("  1 x CPU, 2 ranks each  ") == 2
    assert "--dependency=afterok:JOB-OF-one,singleton" in shown.err and "/two.sbatch" in shown.err
    assert [Resources(**values).size for values in ({}, {"gpus_per_node": 0}, {"tasks_per_node": 1})] == [
        "1 x 8 GPUs",
        "1 x CPU",
        "1 x 8 GPUs, 1 rank each",
    ]


def test_a_wheel_carries_the_templates(tmp_path):
    folders = ["--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", "build", *folders], cwd=ROOT, check=True, capture_output=True)
    found = {path.name for path in (tmp_path / "lib" / "megatron_mixcpt" / "launch").iterdir()}
    assert {"mixcpt.sbatch", "preprocess.sbatch"} <= found


def test_a_missing_template_says_so():
    with pytest.raises(MixcptError, match=r"launch/nothing\.sbatch is missing"):
        template("nothing.sbatch")
