import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from cluster import Cluster, why_not


def pytest_collection_modifyitems(items):
    """One reason for all: no SLURM here. With SLURM_TESTS=required (CI) that is a failure instead."""
    reason = why_not()
    if reason and os.environ.get("SLURM_TESTS") != "required":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster():
    """Two nodes, started for the tests and stopped after them."""
    reason = why_not()
    assert not reason, reason
    with Cluster() as running:
        yield running
