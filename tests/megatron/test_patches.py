"""The patches on real Megatron: the wheels' training code trains with the flag, and every pinned tag gives what is promised.

The wheels of 0.17 and 0.18 are installed into .versions/ when they are not there. With MEGATRON_LM_DIR, a git repository of
Megatron-LM with its tags (a bare one will do), all patches are checked against the tags.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import ROOT, TIMEOUT_SECONDS, TINY, torchrun

from megatron_global_lbl.command import main
from megatron_global_lbl.command.insertions import fits, insertions
from megatron_global_lbl.command.patch import patches_dir, pinned
from megatron_global_lbl.metrics import read
from megatron_global_lbl.specialise.result import read as read_specialisation

HERE = Path(__file__).parent
FILE, PINNED = pinned()
WHEELS = {"0.17.1": "core_v0.17.1", "0.18.2": "core_v0.18.2", "0.19.2": "core_v0.19.0"}
MEGATRON_LM_DIR = os.environ.get("MEGATRON_LM_DIR")
FLAG = ("--moe-lbl-scope", "global")


def installed(release: str) -> Path:
    """The folder into which the wheel of a release is, or now gets, installed."""
    core = importlib.util.find_spec("megatron.core")
    assert core is not None and core.origin is not None
    ours = Path(core.origin).parents[2]
    if f"PATCH = {release.split('.')[2]}\n" in (text := (ours / "megatron/core/package_info.py").read_text()):
        if f"MINOR = {release.split('.')[1]}\n" in text:
            return ours
    folder = ROOT / ".versions" / release
    if not (folder / "megatron" / "core" / "package_info.py").is_file():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(folder),
            f"megatron-core=={release}",
        ]
        subprocess.run(command, check=True, timeout=TIMEOUT_SECONDS)
    return folder


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Callable[[str], Path]:
    """A copy of the Megatron in a release's wheel, patched by the command."""

    @functools.cache
    def patch(release: str) -> Path:
        tree = tmp_path_factory.mktemp("megatron") / release
        shutil.copytree(installed(release) / "megatron", tree / "megatron")
        assert main(["patch", "--megatron", str(tree)]) == 0
        (entry,) = (entry for entry in PINNED if entry.tag == WHEELS[release])
        assert hashlib.sha256((tree / FILE).read_bytes()).hexdigest() == entry.after
        return tree

    return patch


def environment(tree: Path) -> dict[str, str]:
    path = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def train(tree: Path, directory: Path, *launcher: str, more: tuple[str, ...] = ()) -> str:
    """Three steps on two ranks with the flag; what was printed. Without a launcher: `torchrun SCRIPT ARGS`, in CPU mode."""
    command = [*(launcher or [str(HERE / "without_plugin.py")])]
    command += [str(HERE / "patched" / "pretrain_any_release.py"), *TINY, "--train-iters", "3", *FLAG]
    command += ["--moe-lbl-metrics-dir", str(directory), *more]
    status, printed = torchrun(command, 2, TIMEOUT_SECONDS, environment(tree))
    assert status == 0, printed[-6000:]
    return printed


def assert_trained_with_the_hook(printed: str, directory: Path) -> None:
    assert printed.count("> moe-lbl: scope global; f will be counted over the global batch on all data-parallel ranks") == 1
    assert len(re.findall(r"iteration +[123]/ +3 ", printed)) == 3
    assert len(re.findall(r"moe_lbl/max_vio: \S+ \| moe_lbl/dead: ", printed)) == 3, "not in Megatron's line"
    (run,) = read(directory)
    assert run.header["scope"] == "global" and run.iterations.tolist() == [1, 2, 3] and run.layers == ["0", "1"]
    # Of 4 micro-batches of 2 sequences f counts 1, 2, 3 and 4.
    assert run.tokens.tolist() == [160] * 3 and run.sequences.tolist() == [5] * 3


@pytest.mark.parametrize("release", WHEELS)
def test_an_unchanged_script_trains_with_the_flag(patched, tmp_path, release):
    assert_trained_with_the_hook(train(patched(release), tmp_path), tmp_path)


def test_the_launchers_work_on_a_patched_tree(patched, tmp_path):
    """The other way in: one hook and one line all the same. And the measurement on its checkpoint, with a script that has the
    same data for every domain, and test data, too: each domain is evaluated once, and starts from zero."""
    tree, checkpoint = patched("0.17.1"), str(tmp_path / "checkpoint")
    save = ("--save", checkpoint, "--save-interval", "3", "--ckpt-format", "torch")
    assert_trained_with_the_hook(train(tree, tmp_path, "-m", "megatron_global_lbl", "--cpu", more=save), tmp_path)
    (tmp_path / "text.idx").touch()
    domains = (f"a={tmp_path / 'text'}", f"b={tmp_path / 'text'}")
    more = (*save, "--load", checkpoint, "--eval-iters", "2", "--moe-lbl-domains", *domains)
    printed = train(tree, tmp_path, "-m", "megatron_global_lbl.specialise", "--cpu", more=more)
    measured = read_specialisation(tmp_path)
    assert measured.names == ["a", "b"] and measured.iteration == 3 and not re.search(r"iteration +[0-9]+/ ", printed)
    assert [(domain.sequences, domain.tokens) for domain in measured.domains] == [(16, 16 * 32)] * 2
    assert measured.tokens_per_expert[0] == measured.tokens_per_expert[1]
    assert [sum(counts) for counts in measured.tokens_per_expert[0]] == [2 * 16 * 32] * 2


WITHOUT_PLUGIN = """
import contextlib, io, sys
sys.modules["megatron_global_lbl"] = None  # every import of it fails, as if it were not installed
from megatron.training.arguments import parse_args

def parse(*flags, **how):
    sys.argv = ["pretrain_gpt.py", "--num-layers", "2", *flags]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args(**how)
    except SystemExit as error:
        return error.code

assert parse().num_layers == 2, "it starts"
for flags in (["--moe-lbl-scope", "global"], ["--moe-lbl-scope=global"], ["--moe-lbl-group-size=4"]):
    for how in ({}, {"ignore_unknown_args": True}):
        said = parse(*flags, **how)
        assert said.startswith(f"error: {flags[0]} needs the plugin megatron_global_lbl ("), said
        assert "pip install" in said, said
print("all held")
"""


def test_without_the_plugin_it_starts_and_the_flag_says_what_to_install(patched):
    """On one release: the lines that are inserted are the same for all (insertions.py)."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_PLUGIN]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment(patched("0.19.2"))
    )
    assert result.stdout.endswith("all held\n"), result.stderr


def test_every_pinned_release_has_its_patch():
    tags = {entry.tag for entry in PINNED}
    assert tags == {f"core_v0.{minor}" for minor in ("14.0", "15.3", "16.1", "17.0", "17.1", "18.0", "18.2", "19.0")}
    assert {path.stem for path in patches_dir().glob("*.patch")} == tags


def patch_of(entry) -> Path:
    return patches_dir() / f"{entry.tag}.patch"


@pytest.mark.parametrize("entry", PINNED, ids=lambda entry: entry.tag)
def test_a_patch_is_as_small_as_it_can_be(entry):
    """One file, two hunks, one line of context before and after each, of which one is empty."""
    text = patch_of(entry).read_text()
    assert re.findall(r"^(?:---|\+\+\+) (.*)$", text, re.MULTILINE) == [f"a/{FILE}", f"b/{FILE}"]
    lines = text.splitlines()[2:]
    assert [line[:1] for line in lines if line[:1] not in "+"].count("@") == 2
    context = [line for line in lines if line[:1] == " "]
    assert len(context) == 4 and context.count(" ") == 2
    assert not any(line.startswith("-") for line in lines)


@pytest.mark.parametrize("entry", PINNED, ids=lambda entry: entry.tag)
def test_a_patch_adds_what_the_command_inserts(entry):
    """The patches are for other tools: the command does not read them."""
    lines = patch_of(entry).read_bytes().splitlines(keepends=True)[2:]
    hunks = b"".join(line for line in lines if not line.startswith(b"@@"))
    wanted = [
        [b" " + after, *(b"+" + line for line in text.splitlines(keepends=True))] for after, text in insertions(entry.release)
    ]
    assert hunks == b"".join(line for hunk in wanted for line in [*hunk, b" \n"])


def test_the_readme_has_the_table():
    spec = importlib.util.spec_from_file_location("make_patches", ROOT / "scripts" / "make_patches.py")
    assert spec is not None and spec.loader is not None
    make_patches = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_patches)
    assert make_patches.table([entry._asdict() for entry in PINNED]) in (ROOT / "patches" / "README.md").read_text()


@pytest.mark.skipif(MEGATRON_LM_DIR is None, reason="needs MEGATRON_LM_DIR, a git repository of Megatron-LM with its tags")
@pytest.mark.parametrize("entry", PINNED, ids=lambda entry: entry.tag)
class TestTags:
    """Against the releases themselves."""

    @staticmethod
    def git(*command: str) -> bytes:
        return subprocess.run(["git", "-C", str(MEGATRON_LM_DIR), *command], check=True, capture_output=True).stdout

    def test_applies_and_comes_out_again(self, entry, tmp_path, capsys):
        assert self.git("rev-parse", f"{entry.tag}^{{commit}}").decode().strip() == entry.commit
        info = "megatron/core/package_info.py"
        for name in (FILE, info):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_bytes(self.git("show", f"{entry.tag}:{name}"))
        file = tmp_path / FILE
        file.chmod(0o644)

        def sha256() -> str:
            return hashlib.sha256(file.read_bytes()).hexdigest()

        assert sha256() == entry.before
        for arguments, after in (["--check"], entry.before), ([], entry.after), ([], entry.after), (["--check"], entry.after):
            assert main(["patch", "--megatron", str(tmp_path), *arguments]) == 0
            assert sha256() == after, arguments
        compile(file.read_bytes(), FILE, "exec")
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
        assert main(["patch", "--megatron", str(tmp_path), "--reverse"]) == 0
        assert sha256() == entry.before

    def test_common_tools_apply_it_as_well(self, entry, tmp_path):
        (tmp_path / FILE).parent.mkdir(parents=True)
        for tool in (["patch", "-s", "-p1", "-i"], ["git", "apply"]):
            if shutil.which(tool[0]) is None:
                continue
            (tmp_path / FILE).write_bytes(self.git("show", f"{entry.tag}:{FILE}"))
            subprocess.run([*tool, str(patch_of(entry))], check=True, cwd=tmp_path)
            assert hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest() == entry.after

    def test_the_places_are_found_once(self, entry):
        """What the command says of a modified file, that its places are still there, is then no guess."""
        content = self.git("show", f"{entry.tag}:{FILE}")
        assert fits(content, entry.release)
