"""Files that repeat what others say: they must not drift apart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands(path: str, prefix: str) -> list[str]:
    """The commands of a file that call make or a script of the repository, in their order."""
    return re.findall(rf"^{prefix}((?:make [\w-]+|tests/\S+))$", (ROOT / path).read_text(), re.MULTILINE)


def test_the_workflow_runs_what_ci_runs():
    expected = commands(".ci/run", "")
    assert [command for command in expected if command.startswith("make ")]
    assert commands(".github/workflows/ci.yml", r" +- run: ") == expected


@pytest.mark.parametrize("tests", ["SLURM_TESTS", "BROWSER_TESTS"])
def test_the_workflow_and_ci_require_what_they_install(tests):
    assert re.search(rf"^export .*\b{tests}=required", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert re.search(rf"^ +{tests}: required$", (ROOT / ".github/workflows/ci.yml").read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", [".ci/run", ".pre-commit-config.yaml", "CONTRIBUTING.md", "README.md"])
def test_make_targets_exist(file):
    named = set(re.findall(r"(?:^|`|entry: )make ([a-z-]+)", (ROOT / file).read_text(), re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and named and named <= set(phony[1].split()), named


def test_no_two_test_files_have_one_name():
    """Test folders are no packages: of two files of one name pytest collects one, and worker processes import either."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)
