"""One SLURM for all tests of this folder."""

import pytest

from tests.slurm.cluster import missing, running_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(f"no SLURM: {reason}")
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
