"""megatron-core comes without what it would take up by itself, and others find that all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
QUICK = """\
import sys
from megatron_mixcpt.quick_import import quicken
quicken()
import megatron.core.transformer.transformer_layer, megatron.core.distributed
found = {"torch._dynamo", "torch._inductor", "wandb"} & sys.modules.keys()
assert not found, found
import wandb
assert wandb.init
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's functions are compiled")
def test_megatron_core_comes_without_the_compilers_and_wandb_afterwards():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", QUICK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


TAKEN = """\
import sys
import apex.optimizers as before
if sys.argv[1] == "quick":
    import transformer_engine.pytorch.optimizers
    from megatron_mixcpt.quick_import import quicken
    quicken()
import megatron.core.optimizer.clip_grads, megatron.core.models.gpt.gpt_layer_specs
import megatron.core.fusions.fused_layer_norm
import apex.optimizers as after
assert before is after
for name, module in sys.modules.copy().items():
    for value in vars(module).values() if name.startswith("megatron.core") else ():
        origin = getattr(value, "__module__", None) or getattr(value, "__name__", None)
        if str(origin).startswith(("transformer_engine", "apex", "amp_C")):
            print("taken:", name, origin)
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.train.optimizer import build_optimizer
try:
    build_optimizer(None, None)
except ConfigError as error:
    print("refused:", error)
except AttributeError:  # of the model that is none
    print("goes on")
"""
OPTIMIZERS = "class FusedAdam: ...\nclass FusedSGD: ...\n"
TENSORS = "def multi_tensor_applier(): ...\ndef multi_tensor_l2norm(): ...\ndef multi_tensor_scale(): ...\n"
APEX = {
    "apex/__init__.py": "",
    "apex/optimizers.py": OPTIMIZERS,
    "apex/multi_tensor_apply.py": TENSORS,
    "amp_C.py": TENSORS,
}
TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "__version__ = '2.9.0'\n",
    "transformer_engine/pytorch/__init__.py": "",
    "transformer_engine/pytorch/optimizers.py": OPTIMIZERS + TENSORS,
}
FAKES = {"quick": APEX | TRANSFORMER_ENGINE, "as it comes": APEX}


@pytest.mark.parametrize("quick", FAKES)
def test_transformer_engine_and_apex_are_not_taken_up(tmp_path, quick):
    for name, text in FAKES[quick].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TAKEN, quick],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *taken, said = done.stdout.splitlines()
    if quick == "quick":
        assert (taken, said) == ([], "goes on")
    else:  # the fakes are such that megatron-core takes them up, which the trainer refuses
        assert any("megatron.core.optimizer apex" in line for line in taken)
        assert said.startswith("refused: megatron-core has taken up the optimizer of Transformer Engine or Apex")
