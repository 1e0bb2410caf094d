import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from chromium import NAMES, Chromium


def pytest_collection_modifyitems(items):
    """One reason for all: no browser here. With BROWSER_TESTS=required (CI) that is a failure instead."""
    if not any(map(shutil.which, NAMES)) and os.environ.get("BROWSER_TESTS") != "required":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"none of {', '.join(NAMES)} is installed (tests/browser/install.sh)"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A Chromium, with a profile of its own."""
    found = [path for path in map(shutil.which, NAMES) if path]
    assert found, f"none of {', '.join(NAMES)} is installed (tests/browser/install.sh)"
    return Chromium(found[0], tmp_path_factory.mktemp("profile"))
