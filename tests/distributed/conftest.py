import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(scope="session")
def workers():
    """Processes with gloo and real Megatron, kept over all tests of the session."""
    from workers import Pool

    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    pool = Pool(4)
    yield pool
    pool.close()
