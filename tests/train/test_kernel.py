"""Training with the fused Triton kernels, in the interpreter, is training with the reference."""

import numpy as np
import pytest

from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.train.runs import run_all, settings

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

LOSSES = {"logits": {}, "fused head": {"fuse_lm_head": True}}


@pytest.mark.distributed
def test_the_fused_kernels_train_like_the_reference(tmp_path, monkeypatch):
    mix = write_mix(tmp_path / "data", seq_length=16)
    batch = {"steps": 2, "micro_batch_size": 1, "global_batch_size": 2}
    results = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MIXCPT_LSSD", backend)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        runs = {
            name: (free_port(), settings(mix, tmp_path, parallel={"tensor": 2}, train=batch, loss=loss))
            for name, loss in LOSSES.items()
        }
        results[backend] = run_distributed(run_all, 2, runs, timeout=300)[0]
    for name in LOSSES:
        one, other = results["reference"][name], results["triton"][name]
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6, err_msg=name)
        for parameter, gradient in one["gradients"].items():
            np.testing.assert_allclose(other["gradients"][parameter], gradient, atol=1e-6, rtol=0, err_msg=parameter)
