"""Before any test module is collected: without a GPU, Triton kernels run in Triton's interpreter.

Triton decides that when it is first imported, and megatron-core, which many tests import, imports it.
"""

import os

import torch
from hypothesis import settings

# The same examples in every run: what a change broke fails for that change, not for a later one.
settings.register_profile("mixcpt", derandomize=True, deadline=None)
settings.load_profile("mixcpt")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A process of wandb for each of hundreds of tiny runs would take longer than they do; tests/observe has its own.
os.environ["WANDB_MODE"] = "disabled"
