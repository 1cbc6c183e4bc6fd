import functools

import pytest

from megatron_mixcpt.study import run
from tests.helpers.studies import study_file, write_material
from tests.study.pretended import Pretended


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("study"))


@pytest.fixture
def write_study(material, tmp_path):
    """Writes study.yaml with some keys changed; returns its path."""
    return functools.partial(study_file, material, tmp_path)


@pytest.fixture
def pretend(monkeypatch):
    """Studies of some cells start no processes; returns what they would have started."""

    def use(cells, **options):
        pretended = Pretended(cells, **options)
        monkeypatch.setattr(run, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(run._Team, "_process", lambda team, *arguments: pretended(team, *arguments))
        return pretended

    return use
