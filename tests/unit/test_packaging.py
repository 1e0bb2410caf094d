"""What is published: its contents, and that it installs into an environment without PyTorch and Megatron, and runs there."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import megatron_global_lbl

ROOT = Path(__file__).parents[2]
# What a checkout holds beside its files; the links among them are large.
NOT_SOURCE = (".git", ".venv*", ".versions", ".*cache", "build", "dist", "*.egg-info", "__pycache__", "demo-out")
# What a build calls, without the download of setuptools that isolation would cost each time.
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


# As if it were published there.
REPOSITORY = "https://repository.invalid/megatron_global_lbl"


def run(*command: str | Path, cwd: Path | None = None, repository: str = REPOSITORY) -> str:
    """Standard output of a command that has to succeed, run without this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_USER"))}
    environment["MEGATRON_GLOBAL_LBL_REPOSITORY"] = repository
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{command}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The source distribution of this checkout, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=folder / "checkout")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def names(path: Path) -> set[str]:
    """The files in a wheel, or in a source distribution below its one folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def metadata(wheel: Path) -> Message:
    """The wheel's METADATA; its body is the long description."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_the_package_and_the_patches(built):
    found = names(built["wheel"])
    modules = {str(file.relative_to(ROOT)) for file in ROOT.glob("megatron_*/**/*.py")}
    assert modules and modules <= found
    patches = {f"megatron_global_lbl/patches/{file.name}" for file in (ROOT / "patches").glob("*.patch")}
    assert patches and patches <= found
    assert {"megatron_global_lbl/patches/checksums.json", "megatron_global_lbl/py.typed"} <= found
    assert {"megatron_global_lbl/report/page.html", "megatron_global_lbl/report/page.js"} <= found
    assert "megatron_global_lbl.pth" in found, "beside the packages, where Python reads it"
    # A top-level package `tests` or `examples` would be installed over everybody else's.
    assert all(name.startswith("megatron_") for name in found), found


def test_sdist_holds_the_repository(built):
    found = names(built["sdist"])
    folders = [".ci", ".github", "benchmarks", "docs", "examples", "patches", "scripts", "tests"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    wanted = {str(file.relative_to(ROOT)) for file in files if file.suffix != ".pyc"}
    wanted |= {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md"}
    wanted |= {"constraints.txt", "pyproject.toml", ".pre-commit-config.yaml", "megatron_global_lbl.pth"}
    assert wanted <= found, wanted - found
    assert not [name for name in found if name.endswith(".pyc")]


def test_metadata(built):
    fields = metadata(built["wheel"])
    assert fields["Version"] == megatron_global_lbl.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Keywords"] and fields.get_all("Classifier")
    assert {url.split(",")[0] for url in fields.get_all("Project-URL")} >= {"Documentation", "Changelog", "Issues"}
    # A training image keeps its PyTorch and its Megatron: nothing is required without an extra.
    assert [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line] == []


def test_long_description_has_no_relative_links(built):
    """Each link of the README is absolute, images to the file itself, and leads to a file that is there."""
    fields = metadata(built["wheel"])
    repository = fields["Home-page"]
    assert repository == REPOSITORY
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", str(fields.get_payload()))
    assert all(target.startswith("https://") for _, target in links)
    assert "<img" not in str(fields.get_payload())  # setup.py would have to translate these, too
    for image, target in links:
        if target.startswith(repository):
            kind, _, path = target.removeprefix(f"{repository}/").partition("/HEAD/")
            assert kind == ("raw" if image else "blob"), target
            assert (ROOT / path.partition("#")[0]).exists(), target


def test_no_address_is_made_up(tmp_path):
    """Before it is published somewhere."""
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run(sys.executable, "-c", BUILD, "build_wheel", tmp_path, cwd=tmp_path / "checkout", repository="")
    (wheel,) = tmp_path.glob("*.whl")
    fields = metadata(wheel)
    assert fields["Home-page"] is None
    assert fields.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2501.11873"]


def test_citation_names_this_version():
    assert f"\nversion: {megatron_global_lbl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def interpreter(version: str) -> str:
    """A Python of that version, on the PATH or from pyenv; skips the test where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in candidates:
        path = shutil.which(candidate)
        probe = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        if path and subprocess.run([path, "-c", probe], capture_output=True, text=True).stdout.strip() == version:
            return path
    pytest.skip(f"no Python {version} on the PATH or in pyenv")


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
@pytest.mark.parametrize("version", ["3.10", "3.12"])
def test_installs_and_runs_without_anything_else(built, version, kind, tmp_path):
    run(interpreter(version), "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", built[kind])
    command = python.parent / "megatron-lbl"
    assert run(command, "--version", cwd=tmp_path) == f"megatron_global_lbl {megatron_global_lbl.__version__}\n"
    assert "--megatron DIR" in run(command, "patch", "--help", cwd=tmp_path)
    code = "import megatron_global_lbl as lbl; print(lbl.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).strip()).is_relative_to(tmp_path / "venv")
    code = "from megatron_global_lbl.command import patch; print(len(patch.pinned()[1]))"
    assert int(run(python, "-c", code, cwd=tmp_path)) == len(list((ROOT / "patches").glob("*.patch")))
