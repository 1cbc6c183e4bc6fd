"""`make lint` sees an import that the floors of the house forbid."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLANTED = {  # file -> (what it must not import, the contract that says so)
    "kernels/lssd.py": ("megatron_mixcpt.config", "The kernels import nothing of the rest"),
    "data_prep/format.py": ("megatron_mixcpt.runtime.parallel", "Data preparation imports nothing of the trainer"),
    "megatron_mixcpt/units.py": ("tests.helpers.ports", "The product imports no tests, benchmarks or examples"),
    "megatron_mixcpt/model/stage.py": ("megatron_mixcpt.train.loop", "Rooms import from the floors below"),
}


def test_a_planted_import_breaks_the_contract_that_forbids_it(tmp_path):
    for name in ("kernels", "data_prep", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "megatron_mixcpt", tmp_path / "megatron_mixcpt", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, (module, _) in PLANTED.items():
        with open(tmp_path / file, "a") as source:
            source.write(f"\nimport {module}\n")
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    for file, (module, contract) in PLANTED.items():
        assert f"{contract} BROKEN" in told, f"{module} in {file}: {told}"
