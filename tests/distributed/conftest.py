import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The benchmarks' folders are for the tests whose subject is a benchmark and for no other: benchmarks import from this folder.
# Worker processes take this path over.
sys.path[:0] = [os.path.dirname(__file__), str(BENCHMARKS), str(BENCHMARKS / "upstream")]


def pytest_collection_modifyitems(config, items):
    """Mark the core of the matrix."""
    from core_cases import CORE

    names = {item.name: item for item in items}
    for name in CORE & names.keys():
        names[name].add_marker(pytest.mark.core)
    lost = {name for name in CORE - names.keys() if name.split("[")[0] in {item.name.split("[")[0] for item in items}}
    # A file, or a case of it, may be asked for by its name.
    if lost and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"core_cases.py names cases that do not exist: {', '.join(sorted(lost))}")


@pytest.fixture(scope="session")
def workers():
    """Processes with gloo and real Megatron, kept over all tests of the session."""
    from workers import Pool

    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    pool = Pool(4)
    yield pool
    pool.close()
