"""The memory that a process may still take, in control groups made up and real."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_mixcpt.runtime.memory import available_memory

MIB = 1 << 20
VERSIONS = {
    "1": (
        "5:cpu:/\n4:memory:/job/step\n0::/\n",
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
    "2": ("0::/job/step\n", "", ("memory.max", "memory.current", "inactive_file")),
}


def group(folder, names, limit, used, reclaimable):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 1\n{names[2]} {reclaimable}\n")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_tightest_group_counts(tmp_path, version):
    text, controllers, names = VERSIONS[version]
    own, mount = tmp_path / "cgroup", tmp_path / "mount"
    own.write_text(text)
    unlimited = "max" if version == "2" else 2**63 - 4096
    group(mount / controllers / "job" / "step", names, unlimited, 90 * MIB, 5 * MIB)
    group(mount / controllers / "job", names, 100 * MIB, 90 * MIB, 5 * MIB)
    assert available_memory(own, mount) == 15 * MIB
    group(mount / controllers / "job" / "step", names, 92 * MIB, 90 * MIB, 0)
    assert available_memory(own, mount) == 2 * MIB
    group(mount / controllers / "job" / "step", names, 80 * MIB, 90 * MIB, 0)
    assert available_memory(own, mount) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_sees_its_own_group_at_the_root(tmp_path, version):
    text, controllers, names = VERSIONS[version]
    (tmp_path / "cgroup").write_text(text)
    group(tmp_path / "mount" / controllers, names, 100 * MIB, 40 * MIB, 0)
    assert available_memory(tmp_path / "cgroup", tmp_path / "mount") == 60 * MIB


def test_without_groups_it_is_the_machines(tmp_path):
    assert 0 < available_memory(tmp_path / "none") <= psutil.virtual_memory().total


@pytest.mark.parametrize(("mount", "limit"), [("memory", "memory.limit_in_bytes"), ("", "memory.max")])
def test_a_real_group(mount, limit):
    root = Path("/sys/fs/cgroup") / mount
    if not (root / "cgroup.procs").is_file():
        pytest.skip("no control groups of this version")
    folder = root / f"mixcpt-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no right to make a control group: {error}")
    try:
        if not (folder / limit).is_file():
            pytest.skip("control groups of this version have no memory here")
        (folder / limit).write_text(str(200 * MIB))
        code = (
            f"import os; open({str(folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            "from megatron_mixcpt.runtime.memory import available_memory\nprint(available_memory())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert 0 < int(done.stdout) <= 200 * MIB
    finally:
        folder.rmdir()
