"""Ahead-of-time compilation for GPUs that are not here: no spills, wide accesses; CI compiles all variants apart."""

import json
import os
import subprocess
import sys

import pytest

from megatron_mixcpt.kernels import aot
from tests.kernels.variants import NARROW, VARIANTS

COMPILE = """
import json, sys
from megatron_mixcpt.kernels import aot
from tests.kernels.variants import VARIANTS
reports = [aot.compile_variant(variant, arch) for arch in (80, 90, 100) for variant in VARIANTS]
counts = [(r.problems, r.registers, r.wide_loads, r.narrow_loads, r.wide_stores) for r in reports]
print(json.dumps([(*count, aot.table([r])) for count, r in zip(counts, reports)]))
"""


def clean_environment():
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Compiled in a process of its own: this one may have the interpreter in place of the compiler."""
    pytest.importorskip("triton")
    environment = clean_environment() | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return list(zip([(arch, v) for arch in (80, 90, 100) for v in VARIANTS], json.loads(result.stdout)))


def test_no_spills_and_wide_accesses_on_three_architectures(reports):
    for (arch, variant), (problems, registers, wide_loads, narrow_loads, wide_stores, table) in reports:
        assert not problems, (arch, variant.label, problems)
        assert 0 < registers <= 128
        assert f"| {variant.kernel} | {variant.label} | {registers} | 0 |" in table
        if variant.kernel != "combine" and variant.aligned and not variant.ones:
            assert wide_loads > 0 and narrow_loads == variant.scalar_loads
            assert (wide_stores > 0) == (variant.kernel == "gradient")


def test_the_load_check_can_fail(reports):
    """Rows that are not aligned are read in small pieces: that shows, and would be a problem if they were."""
    _, registers, wide_loads, narrow_loads, wide_stores, _ = next(r for (_, v), r in reports if v == NARROW)
    assert wide_loads == 0 and narrow_loads > NARROW.scalar_loads
    as_if = aot.Report(VARIANTS[0], 90, registers, 0, 0, wide_loads, narrow_loads, wide_stores, 9, 1000)
    assert as_if.problems == [f"{narrow_loads - 4} loads of logits are under 16 bytes"]


def test_table_gives_one_figure_for_each_architecture_where_they_differ():
    first = aot.Report(VARIANTS[0], 80, 64, 0, 16, 8, 4, 0, 0, 70_000)
    second = aot.Report(VARIANTS[0], 90, 72, 0, 16, 8, 4, 0, 0, 70_000)
    assert aot.table([first, second]).splitlines()[2:] == [
        "| stats | bf16 has_teacher | 64/72 | 0 | 16 | 8 | 4 | 0 | 70 |"
    ]


def test_spills_and_narrow_stores_are_problems():
    variant = VARIANTS[5]
    report = aot.Report(variant, 90, 255, 16, 0, 6, variant.scalar_loads, 0, 3, 1000)
    assert report.problems == ["spills 16 bytes", "3 stores of gradients are under 16 bytes"]


def test_every_launch_has_its_variant():
    """The list covers what fused.py can ask for: logits, teacher, temperature, weights, targets, details."""
    variants = list(aot.variants())
    assert len(variants) == len(set(variants))
    count = {kernel: sum(v.kernel == kernel for v in variants) for kernel in aot.KERNELS}
    assert count == {"stats": 36, "gradient": 72, "combine": 48}
    # (5 pairs of dtypes with a teacher, 3 dtypes without) x temperature x alignment, and 4 where all sizes are 1; the
    # gradient also x weights. (3 targets, 1 without a teacher) x temperature x weights x (details or not, or sizes 1).


def test_interpreter_in_place_of_the_compiler_is_a_usage_error():
    result = subprocess.run(
        [sys.executable, "-m", "megatron_mixcpt.kernels.aot", "--arch", "90"],
        capture_output=True, text=True, env=clean_environment() | {"TRITON_INTERPRET": "1"}, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2 and "unset it" in result.stderr
