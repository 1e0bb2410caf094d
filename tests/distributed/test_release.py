"""The workers run the release that is asked for, not one that happens to be found first."""

from __future__ import annotations

import os

import pytest
from core_cases import VERSION


def worker_release() -> str:
    from megatron_global_lbl.hook.versions import installed_version

    return installed_version()


@pytest.mark.core
def test_release(workers):
    wanted = os.environ.get("MEGATRON_RELEASE", VERSION)
    assert [version.split("+")[0] for version in workers.run(worker_release, 4)] == [wanted] * 4
