"""Before any test module is collected: one thread a worker of `pytest -n`; Triton's interpreter without a GPU.

Threads of several workers wait for each other's cores: with two each the tests took half as much CPU time again.
Triton decides that when it is first imported, and megatron-core, which many tests import, imports it.
After collection: which tests one worker of `pytest -n` takes, and in which order.
"""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from megatron_mixcpt.quick_import import quicken

# Folders whose tests share what a machine has one of: the SLURM cluster.
TOGETHER = ("slurm",)
# Begun first, in this order: what mostly waits, beside which the other worker has a core and more to itself, then what
# takes longest, so that the workers end at about the same time.
FIRST = ("slurm", "faults", "study", "train", "teacher", "demo", "align", "model")

# The same examples in every run: what a change broke fails for that change, not for a later one.
settings.register_profile("mixcpt", derandomize=True, deadline=None)
settings.load_profile("mixcpt")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

quicken()  # as every command does: nothing is tested with what megatron-core would take up by itself

# A process of wandb for each of hundreds of tiny runs would take longer than they do; tests/observe has its own.
os.environ["WANDB_MODE"] = "disabled"


def pytest_configure(config):
    if config.option.markexpr != "gpu":  # all others have several ranks, and this machine one GPU or none
        os.environ.setdefault("MIXCPT_DEVICE", "cpu")


def _folder(nodeid):
    return nodeid.removeprefix("tests/").split("/", 1)[0]


def pytest_collection_modifyitems(items):
    order = {folder: place for place, folder in enumerate(FIRST)}
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: order.get(_folder(item.nodeid), len(FIRST)))  # stable: files stay whole


def pytest_collection_finish():
    gc.freeze()  # the libraries stay; each grid of one rank that ends collects what it left


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)  # which pytest without xdist does not know
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`: a file's tests share its fixtures and so go to one worker; some folders share more."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            folder = _folder(nodeid)
            return folder if folder in TOGETHER else nodeid.split("::", 1)[0]

    return Scheduler(config, log)
