"""benchmarks/upstream on the installed Megatron-Core: every defect is there, the plugin is right, and the doctor agrees.

A failure here after an upgrade of Megatron-Core may be good news: a defect has been mended, and the table that the doctor
prints (megatron_global_lbl/command/defects.py) and docs/upstream.md have to say so.
"""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import run_all

from megatron_global_lbl.command.defects import DEFECTS
from megatron_global_lbl.hook.versions import release

pytestmark = pytest.mark.xdist_group("test_upstream_scripts")  # one run of all scripts for both tests that read it


@pytest.fixture(scope="module")
def seen(workers, tmp_path_factory):
    """(exit status, what was printed, the report) of all scripts."""
    report = tmp_path_factory.mktemp("upstream") / "report.md"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = run_all.main(["--markdown", str(report)], pool=workers)
    return status, printed.getvalue(), report.read_text(encoding="utf-8")


def test_every_defect_is_shown_and_the_plugin_is_right(seen):
    status, output, report = seen
    assert status == 0, output
    for defect in DEFECTS:
        assert f"{defect.id}: shown: upstream is off, the plugin is right" in output
        assert f"### {defect.id}: {defect.text}" in report


def test_the_doctor_says_the_same(seen, workers):
    """Its table for the installed release, against what was shown."""
    installed = release(workers.run(run_all.megatron_version, 1)[0])
    off = set(re.findall(r"^(D\d) +off ", seen[1], flags=re.MULTILINE))
    assert off == {defect.id for defect in DEFECTS if defect.is_in(installed)}


@pytest.mark.parametrize(
    "upstream_off, plugin_right, status", [(True, True, 0), (False, True, 1), (True, False, 1), (None, None, 2)]
)
def test_exit_status(upstream_off, plugin_right, status):
    finding = run_all.Finding(DEFECTS[0], upstream_off, plugin_right, "")
    assert finding.status == status
