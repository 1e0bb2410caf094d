"""How the tests are spread over processes (`make test`: pytest-xdist, --dist loadgroup)."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What shares an expensive fixture stays in one process: a file, or a function of tests/distributed (whose worker pool is
    kept over all its files), or what a file says itself."""
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        folder = item.path.relative_to(HERE).parts[0]
        name = item.path.stem
        if folder == "distributed" and "workers" in item.fixturenames:
            name = f"{name}.{item.originalname}"
        item.add_marker(pytest.mark.xdist_group(name))
