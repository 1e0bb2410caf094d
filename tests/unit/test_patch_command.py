"""`megatron-lbl patch`: exact application, and a tree that it must leave alone. On a made-up tree;
tests/megatron/test_patches.py has the real ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_global_lbl.command import files, main, patch
from megatron_global_lbl.command.insertions import DoesNotFit, insert, insertions, remove

ROOT = Path(__file__).parents[2]
FILE = "megatron/training/arguments.py"
(PARSER, ADDED), (PRINTED, ACTED) = ((after.decode(), text.decode()) for after, text in insertions((0, 18)))
BEFORE = "".join(f"line {number}\n" for number in range(1, 31))
BEFORE = BEFORE.replace("line 9\nline 10\n", PARSER + "\n").replace("line 20\nline 21\n", PRINTED + "\n")
AFTER = BEFORE.replace(PARSER, PARSER + ADDED).replace(PRINTED, PRINTED + ACTED)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A Megatron-Core 0.18.2 whose arguments are 30 lines, and checksums for its release and another one."""
    patches = tmp_path / "patches"
    patches.mkdir()
    rows = [
        {"tag": tag, "commit": "c" * 40, "before": sha256(before), "after": sha256(after), "checked": "2026-11-22"}
        for tag, before, after in (("core_v0.17.1", "old\n", "old+\n"), ("core_v0.18.2", BEFORE, AFTER))
    ]
    (patches / "checksums.json").write_text(json.dumps({"file": FILE, "patches": rows}))
    monkeypatch.setattr(patch, "patches_dir", lambda: patches)
    tree = tmp_path / "tree"
    for folder in ("core", "training"):
        (tree / "megatron" / folder).mkdir(parents=True)
    (tree / "megatron/core/package_info.py").write_text("MAJOR = 0\nMINOR = 18\nPATCH = 2\nPRE_RELEASE = ''\n")
    (tree / FILE).write_text(BEFORE)
    return tree


def snapshot(tree):
    """Every file with its content, mode and time of change."""
    return {
        path: (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) for path in tree.rglob("*") if path.is_file()
    }


def refused(tree, capsys, *arguments: str) -> str:
    """The command refuses and leaves the tree alone; what it says."""
    before = snapshot(tree)
    assert main(["patch", "--megatron", str(tree), *arguments]) == 1
    assert snapshot(tree) == before
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.endswith("\nNothing was changed.\n")
    return printed.err


def test_patches_once_and_takes_it_out(tree, capsys):
    file = tree / FILE
    file.chmod(0o640)

    def run(*arguments):
        assert main(["patch", "--megatron", str(tree), *arguments]) == 0
        return capsys.readouterr().out

    untouched = snapshot(tree)
    assert "not patched; the patch fits" in run("--check")
    assert "nothing to take out" in run("--reverse")
    assert snapshot(tree) == untouched
    assert "patched; its scripts take" in run()
    assert file.read_text() == AFTER and file.stat().st_mode & 0o777 == 0o640
    done = snapshot(tree)
    assert "already patched" in run() and "patched\n" in run("--check")
    assert snapshot(tree) == done, "the second time nothing is written"
    assert "taken out" in run("--reverse")
    assert file.read_text() == BEFORE and file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in file.parent.iterdir()) == ["arguments.py"], "no temporary file stays"


def test_a_modified_file_is_left_alone(tree, capsys):
    (tree / FILE).write_text(BEFORE.replace("line 15\n", "line fifteen\n"))
    for arguments in ([], ["--check"], ["--reverse"]):
        said = refused(tree, capsys, *arguments)
        assert "(Megatron-Core 0.18.2) is not the file of core_v0.18.2" in said
        assert sha256(BEFORE) in said and sha256((tree / FILE).read_text()) in said
        assert "-m megatron_global_lbl pretrain_gpt.py" in said, "the launcher needs no patch"
        assert "Apply it by hand, its places are still there" in said


def test_says_when_the_places_are_gone(tree, capsys):
    (tree / FILE).write_text(BEFORE.replace(PARSER, "    parser = mine(parser)\n"))
    assert "by hand" not in refused(tree, capsys)


def test_a_patched_file_with_something_added_is_left_alone(tree, capsys):
    (tree / FILE).write_text(AFTER + "mine\n")
    said = refused(tree, capsys)
    assert "names megatron_global_lbl already" in said and "by hand" not in said
    refused(tree, capsys, "--reverse")


def test_says_which_release_the_file_is_of(tree, capsys):
    (tree / FILE).write_text("old\n")
    assert "It is the file of core_v0.17.1." in refused(tree, capsys)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_nothing_of_the_tree_is_run(tree, tmp_path, capsys):
    """A partial clone asks its remote for objects that it lacks; this one's remote is a program."""
    marker = tmp_path / "was-run"
    subprocess.run(["git", "-C", str(tree), "init", "-q"], check=True)
    with (tree / ".git" / "config").open("a") as config:
        config.write(
            "[extensions]\n\tpartialClone = origin\n"
            f'[remote "origin"]\n\tpromisor = true\n\turl = "ext::touch {marker}"\n'
            '[protocol "ext"]\n\tallow = always\n'
            f"[core]\n\tfsmonitor = touch {marker}\n"
        )
    subprocess.run(["git", "-C", str(tree), "show", "c" * 40], capture_output=True)
    assert marker.exists(), "git itself runs it: the test can fail"
    marker.unlink()
    (tree / FILE).write_text(BEFORE.replace("line 3\n", "mine\n"))
    for arguments in ([], ["--check"], ["--reverse"]):
        assert "is not the file of core_v0.18.2" in refused(tree, capsys, *arguments)
    assert not marker.exists()


@pytest.mark.parametrize("linked", [FILE, "megatron/training", "megatron/core/package_info.py", "megatron"])
def test_no_link_is_followed_out_of_the_tree(tree, tmp_path, capsys, linked):
    outside = tmp_path / "outside"
    os.rename(tree / linked, outside)
    (tree / linked).symlink_to(outside)
    before = snapshot(tmp_path)
    for arguments in ([], ["--check"], ["--reverse"]):
        assert "by a symbolic link out of the tree" in refused(tree, capsys, *arguments)
    assert snapshot(tmp_path) == before


def test_a_tree_that_is_a_link_and_links_inside_of_it(tree, tmp_path):
    """Such a link stays one; another name of the same file (package caches) keeps the original content."""
    real, other = tree / "real.py", tmp_path / "cache.py"
    os.rename(tree / FILE, real)
    (tree / FILE).symlink_to(real)
    os.link(real, other)
    (tmp_path / "link").symlink_to(tree)
    assert main(["patch", "--megatron", str(tmp_path / "link")]) == 0
    assert (tree / FILE).is_symlink() and real.read_text() == AFTER and other.read_text() == BEFORE


def test_names_the_release_of_the_tree_and_the_one_that_python_imports(tree, tmp_path, capsys, monkeypatch):
    """The second is often another: that of an installed wheel."""
    assert main(["patch", "--megatron", str(tree), "--check"]) == 0
    assert "(Megatron-Core 0.18.2: the file of core_v0.18.2)" in capsys.readouterr().out
    other = tmp_path / "other"
    shutil.copytree(tree, other)
    info = other / "megatron/core/package_info.py"
    info.write_text(info.read_text().replace("18", "17"))
    monkeypatch.setattr(patch.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[found]))
    found = str(other / "megatron")
    assert main(["patch", "--megatron", str(tree)]) == 0
    assert f"This Python imports Megatron-Core 0.17.2 from {other}; the tree's scripts use" in capsys.readouterr().out
    assert main(["patch", "--megatron", str(tree), "--reverse"]) == 0
    capsys.readouterr()
    found = str(tree / "megatron")
    assert main(["patch", "--megatron", str(tree)]) == 0
    assert "This Python" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["MAJOR = 0\n", "MAJOR = 'x'\nMINOR = 18\nPATCH = 2\n", "\udcff"])
def test_a_version_that_is_none(tree, capsys, text):
    (tree / "megatron/core/package_info.py").write_text(text, errors="surrogateescape")
    assert "says no version" in refused(tree, capsys)


def launcher_takes(tree) -> bool:
    """Whether the launcher starts a script in the tree."""
    script = tree / "pretrain_gpt.py"
    script.write_text("print('started')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)])}
    command = [sys.executable, "-m", "megatron_global_lbl", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode == 0) == (result.stdout == "started\n"), result.stderr
    return result.returncode == 0


@pytest.mark.parametrize("training", [True, False], ids=["with its training loop", "core only"])
@pytest.mark.parametrize("minor", [13, 18, 20, 21])
def test_points_to_the_launcher_where_that_runs_and_nowhere_else(tree, capsys, minor, training):
    info = tree / "megatron/core/package_info.py"
    info.write_text(info.read_text().replace("18", str(minor)))
    (tree / "megatron/core/__init__.py").write_text(f"__version__ = '0.{minor}.2'\n")
    (tree / "megatron/__init__.py").write_text("")
    if training:  # a file that no patch is for, but that the launcher can hook
        (tree / FILE).write_text("def add_megatron_arguments(parser): ...\ndef validate_args(args): ...\n")
    else:
        shutil.rmtree(tree / "megatron/training")
    said = refused(tree, capsys)
    assert ("-m megatron_global_lbl" in said) == launcher_takes(tree), said
    assert f"Megatron-Core 0.{minor}.2" in said
    if minor in (13, 21):
        assert "is not supported" in said and "0.14 to 0.19" in said
    if minor == 20 and training:
        assert "there are patches for core_v0.17.1, core_v0.18.2" in said
        assert "preview: Megatron-Core 0.20.2 is newer than what is tested" in said


def test_no_megatron_and_no_training_loop(tree, capsys):
    assert "no Megatron there" in refused(tree / "megatron", capsys)
    (tree / FILE).unlink()
    assert "0.18.2 without its training loop" in refused(tree, capsys)


def test_damaged_checksums_change_nothing(tree, capsys):
    table = patch.patches_dir() / "checksums.json"
    table.write_text(table.read_text().replace(sha256(AFTER), "0" * 64))
    assert "does not give the file" in refused(tree, capsys)
    table.write_text(table.read_text().replace(sha256(BEFORE), sha256(AFTER)))
    (tree / FILE).write_text(AFTER)  # taken for the release's own: there is nothing left to insert after
    assert "not there exactly once" in refused(tree, capsys)


def test_a_file_that_cannot_be_written_stays(tree, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    said = refused(tree, capsys)
    assert "No space left on device" in said and "Errno" not in said


@pytest.mark.parametrize(
    "content",
    [
        BEFORE.replace(PARSER, ""),
        BEFORE.replace(PRINTED, PRINTED + "line 21\n"),
        BEFORE + PARSER + "\n",
        BEFORE.replace(PARSER, "    " + PARSER),
    ],
    ids=["gone", "no empty line behind it", "twice", "in another block"],
)
def test_inserts_after_known_lines_only(content):
    with pytest.raises(DoesNotFit):
        insert(content.encode(), (0, 18))


@pytest.mark.parametrize("content", [BEFORE, AFTER.replace(ACTED, ""), AFTER + PARSER + ADDED], ids=["none", "one", "twice"])
def test_takes_out_what_was_inserted_only(content):
    with pytest.raises(DoesNotFit):
        remove(content.encode(), (0, 18))


def test_patches_without_pytorch(tree):
    """On a login node there may be none."""
    code = "import sys; sys.modules['torch'] = None; from megatron_global_lbl.command import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run([sys.executable, "-c", code, "patch", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--megatron" in result.stdout, result.stderr
