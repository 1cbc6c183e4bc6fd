import functools

import pytest

from tests.helpers.studies import study_file, write_material


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("study"))


@pytest.fixture
def write_study(material, tmp_path):
    """Writes study.yaml with some keys changed; returns its path."""
    return functools.partial(study_file, material, tmp_path)
