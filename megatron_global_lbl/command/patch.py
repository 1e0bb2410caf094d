"""Patches a Megatron-LM source tree of a pinned release, so that its own scripts take the flags --moe-lbl-*.

The tree is read, and one file of it is replaced. Nothing of it is run or imported, git is not called, and no symbolic link is
followed out of it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from megatron_global_lbl.command.files import reason, replace_file
from megatron_global_lbl.command.insertions import DoesNotFit, fits, insert, remove
from megatron_global_lbl.hook.versions import SUPPORTED, is_supported, preview, release

PACKAGE = Path(__file__).parents[1]


class Refused(Exception):
    """Why the tree is left as it is, and what the user can do."""


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


def patches_dir() -> Path:
    """The folder patches/: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / "patches"
    return inside if inside.is_dir() else PACKAGE.parent / "patches"


def pinned() -> tuple[str, list[Pinned]]:
    """The file that the patches change, relative to the tree, and the releases they were made against."""
    table = json.loads((patches_dir() / "checksums.json").read_text(encoding="utf-8"))
    return table["file"], [Pinned(**row) for row in table["patches"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megatron", metavar="DIR", required=True, help="the tree: the folder that holds megatron/core")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="say whether it is or can be patched; change nothing")
    action.add_argument("--reverse", action="store_true", help="take the patch out again")


def run(args: argparse.Namespace) -> int:
    """0 if the tree is (or, with --check, can be) what was asked for, 1 if not, and then nothing was changed."""
    try:
        print(patch(Path(args.megatron), check=args.check, reverse=args.reverse))
    except (Refused, DoesNotFit, OSError) as error:
        print(f"megatron-lbl patch: error: {reason(error)}\nNothing was changed.", file=sys.stderr)
        return 1
    return 0


def patch(tree: Path, *, check: bool = False, reverse: bool = False) -> str:
    """Apply the patch for the tree's release, or take it out; what was done, in words. Raises as `run` catches."""
    name, releases = pinned()
    version = find_version(tree)
    tags = ", ".join(entry.tag for entry in releases)
    if not is_supported(version):
        raise Refused(
            f"{tree} is Megatron-Core {version}, which is not supported, with a patch or without; supported: {SUPPORTED}; "
            f"there are patches for {tags}"
        )
    file = inside(tree, name)
    if file is None:
        raise Refused(
            f"{tree / name} is missing: Megatron-Core {version} without its training loop. Allowed: a Megatron-LM source tree, "
            "or the folder of an installed wheel of megatron-core >= 0.17"
        )
    candidates = [entry for entry in releases if entry.release == release(version)]
    if not candidates:
        raise Refused(f"{tree} is Megatron-Core {version}; there are patches for {tags}.\n{_launcher(version)}")
    content = file.read_bytes()
    known = next((entry for entry in candidates if _is_of(entry, content)), None)
    if known is None:
        nearest = next((entry for entry in candidates if entry.version == version), candidates[-1])
        raise Refused(what_differs(tree, name, version, content, nearest, releases))
    is_patched = hashlib.sha256(content).hexdigest() == known.after
    said = f"{tree / name} (Megatron-Core {version}: the file of {known.tag})"
    if check:
        return f"{said}: patched" if is_patched else f"{said}: not patched; the patch fits"
    if is_patched is not reverse:
        return f"{said}: not patched, nothing to take out" if reverse else f"{said}: already patched"
    changed = (remove if reverse else insert)(content, known.release)
    if hashlib.sha256(changed).hexdigest() != (known.before if reverse else known.after):
        raise DoesNotFit(f"the patch of {known.tag} does not give the file that {patches_dir() / 'checksums.json'} promises")
    replace_file(file, changed)
    done = f"patched; its scripts take --moe-lbl-scope now{_another_megatron(tree, version)}"
    return f"{said}: {'patch taken out' if reverse else done}"


def find_version(tree: Path) -> str:
    """Version of the Megatron-Core in the tree, read from its text; Refused if there is none."""
    name = "megatron/core/package_info.py"
    info = inside(tree, name)
    if info is None:
        raise Refused(
            f"--megatron {tree}: no Megatron there ({tree / name} is missing); allowed: the folder that holds megatron/core"
        )
    text = info.read_text(encoding="utf-8", errors="replace")
    values = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = ['\"]?(\w*)['\"]?\s*$", text, re.MULTILINE))
    if not all(values.get(part, "").isdecimal() for part in ("MAJOR", "MINOR", "PATCH")):
        raise Refused(f"{tree / name} says no version (MAJOR, MINOR, PATCH)")
    return f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}{values.get('PRE_RELEASE', '')}"


def inside(tree: Path, name: str) -> Path | None:
    """The file of that name in the tree, links resolved; None if there is none, Refused if a link leads out of the tree."""
    file = Path(os.path.realpath(tree / name))  # `resolve` raises at a loop of links
    if not file.is_relative_to(tree.resolve()):
        raise Refused(f"{tree / name} is {file}, by a symbolic link out of the tree; patch the tree that holds that file")
    return file if file.is_file() else None


def _another_megatron(tree: Path, version: str) -> str:
    """A line if Python would import another release than the tree's; found without an import."""
    spec = importlib.util.find_spec("megatron")
    for folder in (spec and spec.submodule_search_locations) or []:
        other = Path(folder).resolve().parent
        with contextlib.suppress(Refused, OSError):
            if other != tree.resolve() and (found := find_version(other)) != version:
                said = f"This Python imports Megatron-Core {found} from {other}"
                return f"\n{said}; the tree's scripts use the tree's {version} when the tree comes first on PYTHONPATH."
    return ""


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
    lines.append(f"What you can do:\n  - {_launcher(version)}")
    if fits(content, known.release) and b"megatron_global_lbl" not in content:
        lines.append(
            f"  - Apply it by hand, its places are still there: patch -d {tree} -p1 < {patches_dir() / f'{known.tag}.patch'}"
        )
    lines.append(f"  - Put the file of {known.tag} back (commit {known.commit}), run this, then make your changes again.")
    return "\n".join(lines)


def _launcher(version: str) -> str:
    """It works on every tree of a supported version that has its training loop."""
    note = f" ({preview(version)})" if preview(version) else ""
    return f"Without a patch: torchrun ... -m megatron_global_lbl pretrain_gpt.py ARGS --moe-lbl-scope global{note}"


def _is_of(entry: Pinned, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() in (entry.before, entry.after)
