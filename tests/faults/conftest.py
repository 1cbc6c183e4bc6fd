"""Inputs shared by the fault tests, and the figures that all of them together leave for docs/reliability.md."""

from pathlib import Path

import pytest

from tests.faults.fleet import FULL, finish, metrics, write_config
from tests.faults.report import Figures
from tests.helpers.corpus import write_mix
from tests.train.runs import settings

STEPS = 12


@pytest.fixture(scope="session")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("faults") / "data", seq_length=16, vocab_size=120)


@pytest.fixture(scope="session")
def straight(tmp_path_factory, mix):
    """An uninterrupted run of STEPS steps: `(run_dir, losses by step)`."""
    folder = tmp_path_factory.mktemp("straight")
    finish(write_config(folder / "train.yaml", run_settings(mix, folder / "run")))
    return folder / "run", metrics(folder / "run", "train/loss")


def run_settings(mix, run_dir, **sections):
    """A configuration of STEPS steps of four short samples; sections are merged."""
    train = {"steps": STEPS, "micro_batch_size": 1, "global_batch_size": 4, "warmup_steps": 2}
    values = settings(mix, run_dir, train=train | sections.pop("train", {}))
    return values | {"checkpoint": {"every": 1, "keep": 2} | sections.pop("checkpoint", {})} | sections


figures = pytest.StashKey[Figures]()


@pytest.fixture(scope="session")
def record(request):
    """`record(test, aim, result)`: a row of the table of docs/reliability.md."""
    return request.config.stash[figures].add


def pytest_configure(config):
    config.stash[figures] = Figures()


def pytest_sessionfinish(session, exitstatus):
    chosen = session.config.getoption("keyword") or any("::" in word for word in session.config.args)
    files = {item.path for item in session.items}
    if FULL and exitstatus == 0 and not chosen and files >= set(Path(__file__).parent.glob("test_*.py")):
        session.config.stash[figures].write()
