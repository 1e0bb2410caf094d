import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The benchmarks' folders are for the tests whose subject is a benchmark and for no other: benchmarks import from this folder.
# Worker processes take this path over.
sys.path[:0] = [os.path.dirname(__file__), str(BENCHMARKS), str(BENCHMARKS / "upstream")]


@pytest.fixture(scope="session")
def workers():
    """Processes with gloo and real Megatron, kept over all tests of the session."""
    from workers import Pool

    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    pool = Pool(4)
    yield pool
    pool.close()
