"""Patches a Megatron-LM source tree of a pinned release, so that its own scripts take the flags --moe-lbl-*."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from megatron_global_lbl.command.files import replace_file
from megatron_global_lbl.command.insertions import DoesNotFit, fits, insert, remove
from megatron_global_lbl.hook.versions import SUPPORTED, is_supported, preview, release

PACKAGE = Path(__file__).parents[1]
LAUNCHER = "torchrun ... -m megatron_global_lbl pretrain_gpt.py ARGS --moe-lbl-scope global"


class Refused(Exception):
    """The tree is left as it is; the message says why and what the user can do."""


class Pinned(NamedTuple):
    """A release that a patch was made against, and the SHA-256 of its file without and with the patch."""

    tag: str
    commit: str
    before: str
    after: str
    checked: str

    @property
    def version(self) -> str:
        return self.tag.removeprefix("core_v")

    @property
    def release(self) -> tuple[int, int]:
        return release(self.version)

    @property
    def path(self) -> Path:
        return patches_dir() / f"{self.tag}.patch"


def patches_dir() -> Path:
    """The folder patches/: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / "patches"
    return inside if inside.is_dir() else PACKAGE.parent / "patches"


def pinned() -> tuple[str, list[Pinned]]:
    """The file that the patches change, relative to the tree, and the releases they were made against."""
    table = json.loads((patches_dir() / "checksums.json").read_text(encoding="utf-8"))
    return table["file"], [Pinned(**row) for row in table["patches"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tree, and what to do with it."""
    parser.add_argument("--megatron", metavar="DIR", required=True, help="the tree: the folder that holds megatron/core")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="say whether it is or can be patched; change nothing")
    action.add_argument("--reverse", action="store_true", help="take the patch out again")


def run(args: argparse.Namespace) -> int:
    """Patch the tree; 0 if it is (or, with --check, can be) what was asked for, 1 if not, and then nothing was changed."""
    try:
        print(patch(Path(args.megatron), check=args.check, reverse=args.reverse))
    except (Refused, DoesNotFit, OSError) as error:
        print(f"megatron-lbl patch: error: {error}\nNothing was changed.", file=sys.stderr)
        return 1
    return 0


def patch(tree: Path, *, check: bool = False, reverse: bool = False) -> str:
    """Apply the patch for the tree's release, or take it out; what was done, in one line.

    Raises:
        Refused: no Megatron, an unsupported or no pinned release, or a file that is not the release's own.
        DoesNotFit: the checksums are damaged.
        OSError: a file cannot be read or written.
    """
    name, releases = pinned()
    version = find_version(tree)
    tags = ", ".join(entry.tag for entry in releases)
    if not is_supported(version):
        raise Refused(
            f"{tree} is Megatron-Core {version}, which is not supported, with a patch or without; supported: {SUPPORTED}; "
            f"there are patches for {tags}"
        )
    file = tree / name
    if not file.is_file():
        raise Refused(
            f"{file} is missing: Megatron-Core {version} without its training loop. Allowed: a Megatron-LM source tree, or "
            "the folder of an installed wheel of megatron-core >= 0.17"
        )
    candidates = [entry for entry in releases if entry.release == release(version)]
    if not candidates:
        raise Refused(f"{tree} is Megatron-Core {version}; there are patches for {tags}.\n{without_patch(version)}")
    content = file.read_bytes()
    known = next((entry for entry in candidates if _is_of(entry, content)), None)
    if known is None:
        nearest = next((entry for entry in candidates if entry.version == version), candidates[-1])
        raise Refused(what_differs(tree, name, version, content, nearest, releases))
    is_patched = hashlib.sha256(content).hexdigest() == known.after
    said = f"{file} ({known.tag})"
    if check:
        return f"{said}: patched" if is_patched else f"{said}: not patched; the patch fits"
    if is_patched is not reverse:
        return f"{said}: not patched, nothing to take out" if reverse else f"{said}: already patched"
    changed = (remove if reverse else insert)(content, known.release)
    wanted = known.before if reverse else known.after
    if hashlib.sha256(changed).hexdigest() != wanted:
        raise DoesNotFit(f"the patch of {known.tag} does not give the file that {patches_dir() / 'checksums.json'} promises")
    replace_file(file, changed)
    return f"{said}: patch taken out" if reverse else f"{said}: patched; its scripts take --moe-lbl-scope now"


def find_version(tree: Path) -> str:
    """Version of the Megatron-Core in the tree, read without importing it.

    Raises:
        Refused: there is none.
    """
    info = tree / "megatron" / "core" / "package_info.py"
    if not info.is_file():
        raise Refused(f"--megatron {tree}: no Megatron there ({info} is missing); allowed: the folder that holds megatron/core")
    values = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = ['\"]?(\w*)['\"]?\s*$", info.read_text(), re.MULTILINE))
    if not {"MAJOR", "MINOR", "PATCH"} <= values.keys():
        raise Refused(f"{info} says no version (MAJOR, MINOR, PATCH)")
    return f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}{values.get('PRE_RELEASE', '')}"


def without_patch(version: str) -> str:
    """What works on every tree of a supported version that has its training loop; the launcher refuses all others."""
    note = preview(version)
    return f"Without a patch: {LAUNCHER}" + (f" ({note})" if note else "")


def what_differs(tree: Path, name: str, version: str, content: bytes, known: Pinned, releases: list[Pinned]) -> str:
    """Why a file with another checksum is not patched, and what the user can do."""
    lines = [
        f"{tree / name} (Megatron-Core {version}) is not the file of {known.tag}.",
        f"  SHA-256 found     {hashlib.sha256(content).hexdigest()}",
        f"          expected  {known.before}, or patched {known.after}",
    ]
    if b"megatron_global_lbl" in content:
        lines.append("  It names megatron_global_lbl already: patched with something else added, or by another patch.")
    lines += [f"  It is the file of {entry.tag}." for entry in releases if _is_of(entry, content)]
    if differences := _against_git(tree, name, content, known):
        lines.append(f"  Lines that differ from {known.tag}: {differences}")
    lines.append(f"What you can do:\n  - {without_patch(version)}")
    if fits(content, known.release) and b"megatron_global_lbl" not in content:
        lines.append(f"  - Apply it by hand, its places are still there: patch -d {tree} -p1 < {known.path}")
    lines.append(f"  - Put the file of {known.tag} back (commit {known.commit}), run this, then make your changes again.")
    return "\n".join(lines)


def _is_of(entry: Pinned, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() in (entry.before, entry.after)


def _against_git(tree: Path, name: str, content: bytes, known: Pinned) -> str:
    """Line numbers at which the file differs from the release's, if the tree is a git checkout that has the release."""
    command = ["git", "-C", str(tree), "show", f"{known.commit}:{name}"]
    try:
        original = subprocess.run(command, capture_output=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if hashlib.sha256(original).hexdigest() != known.before:
        return ""
    matcher = difflib.SequenceMatcher(None, original.split(b"\n"), content.split(b"\n"), autojunk=False)
    spans = [(start, stop) for kind, _, _, start, stop in matcher.get_opcodes() if kind != "equal"]
    shown = [str(start + 1) if stop <= start + 1 else f"{start + 1}-{stop}" for start, stop in spans[:10]]
    return ", ".join(shown) + (f" and {len(spans) - 10} more places" if len(spans) > 10 else "")
