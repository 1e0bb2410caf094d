"""benchmarks/upstream on the installed Megatron-Core: every defect is there, the plugin is right, and the doctor agrees.

A failure here after an upgrade of Megatron-Core may be good news: a defect has been mended, and docs/upstream.md has to say
so.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import run_all

from megatron_global_lbl.defects import DEFECTS


def test_every_defect_is_shown_and_the_plugin_is_right(workers, capsys, tmp_path):
    report = tmp_path / "report.md"
    status = run_all.main(["--markdown", str(report)], pool=workers)
    output = capsys.readouterr().out
    assert status == 0, output
    for defect in DEFECTS:
        assert f"{defect.id}: shown: upstream is off, the plugin is right" in output
        assert f"### {defect.id}: {defect.text}" in report.read_text(encoding="utf-8")


def test_the_doctor_sees_the_same():
    command = [sys.executable, "-W", "ignore", "-m", "megatron_global_lbl.hook.upstream_probes"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(result.stdout.splitlines()[-1])
    assert {id: finding["present"] for id, finding in found.items()} == {defect.id: True for defect in DEFECTS}, found


@pytest.mark.parametrize(
    "upstream_off, plugin_right, status", [(True, True, 0), (False, True, 1), (True, False, 1), (None, None, 2)]
)
def test_exit_status(upstream_off, plugin_right, status):
    finding = run_all.Finding(DEFECTS[0], upstream_off, plugin_right, "")
    assert finding.status == status
