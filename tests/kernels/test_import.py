"""The package needs torch alone: not triton, and nothing of the trainer."""

import subprocess
import sys

import pytest

LOSS = """
import torch
from megatron_mixcpt.kernels import linear_lssd_loss, lssd_loss, topk_lssd_loss
student = torch.randn(3, 8, requires_grad=True)
lssd_loss(student, torch.randn(3, 8), torch.arange(3)).sum().backward()
assert student.grad.abs().sum() > 0
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | environment,
    )


def test_works_without_triton_and_imports_no_megatron():
    imported = """
loaded = [name for name in sys.modules if name.split('.')[0] in ('megatron', 'transformers', 'deepspeed')]
assert not loaded, loaded
assert not [name for name in sys.modules if name.startswith('megatron_mixcpt.') and '.kernels' not in name]
"""
    result = run("import sys; sys.modules['triton'] = None" + LOSS + imported)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            "import sys; sys.modules['triton'] = None",
            "ImportError: MIXCPT_LSSD=triton, but triton is not installed",
        ),
        ("", "ValueError: MIXCPT_LSSD=triton, but the logits are on cpu: that needs TRITON_INTERPRET=1"),
    ],
    ids=["no triton", "no interpreter"],
)
def test_forcing_triton_where_it_cannot_run_says_why(before, message):
    result = run(before + LOSS, MIXCPT_LSSD="triton")
    assert result.returncode == 1 and message in result.stderr


def test_forced_triton_computes_with_the_kernels():
    spy = """
from megatron_mixcpt.kernels import fused
calls, original = [], fused.stats
fused.stats = lambda *args: calls.append(1) or original(*args)
"""
    result = run(spy + LOSS + "assert calls", MIXCPT_LSSD="triton", TRITON_INTERPRET="1", HOME="/tmp")
    assert result.returncode == 0, result.stderr
