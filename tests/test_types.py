"""`make lint` sees a wrong type where the trainer uses kernels/ and data_prep/, which lie outside its folder."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
USES = {
    "kernels": """
from torch import Tensor
from megatron_mixcpt.kernels import lssd_loss

def planted(logits: Tensor, labels: Tensor) -> Tensor:
    return lssd_loss(logits, logits, labels, margin="wide")
""",
    "data_prep": """
from megatron_mixcpt.data_prep.format import open_indexed

open_indexed(7)
""",
}
# Reading the libraries takes ten times as long as reading ours; their types are not what is asked here.
LIBRARIES = """
[[tool.mypy.overrides]]
module = ["torch.*", "triton.*", "numpy.*", "transformers.*", "pydantic.*", "pyarrow.*", "rich.*", "matplotlib.*"]
follow_imports = "skip"
"""


def test_a_planted_error_across_each_border_is_found(tmp_path):
    """With the project's configuration, on a package of the two folders, what links them in, and one file for each."""
    package = tmp_path / "megatron_mixcpt"
    package.mkdir()
    for name in USES:
        shutil.copytree(ROOT / name, tmp_path / name)
        shutil.copy(ROOT / "megatron_mixcpt" / name, package / name, follow_symlinks=False)
        (package / f"uses_{name}.py").write_text(USES[name])
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "megatron_mixcpt" / name, package)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + LIBRARIES)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = [line for line in done.stdout.splitlines() if "uses_" in line and ": error: " in line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(found) == 2, done.stdout
    assert any("uses_kernels.py:6" in line and '"margin" to "lssd_loss"' in line for line in found), found
    assert any("uses_data_prep.py:4" in line and '1 to "open_indexed"' in line for line in found), found
