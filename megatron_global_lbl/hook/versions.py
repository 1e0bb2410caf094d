"""Which Megatron-Core is installed, and which releases the hook was made for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

TESTED = "0.14 to 0.19"
SUPPORTED = f"{TESTED}, and 0.20 as a preview"
_FIRST, _LAST, _PREVIEW = (0, 14), (0, 19), (0, 20)


class UnsupportedMegatron(ImportError):
    """No Megatron-Core, one outside the supported releases, or a symbol that is not where it should be."""


def installed_version() -> str:
    """Version of the Megatron-Core that `import megatron.core` finds.

    Raises:
        UnsupportedMegatron: there is none.
    """
    try:
        found = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UnsupportedMegatron(
            f"no Megatron-Core found (module megatron.core); supported: {SUPPORTED}, from `pip install megatron-core` or a "
            "Megatron-LM source tree on PYTHONPATH"
        )
    return importlib.import_module("megatron.core").__version__


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "0.19.2" or "0.16.0rc3"."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def is_supported(version: str) -> bool:
    """Whether the hook was made for this version, tested or as a preview."""
    return _FIRST <= release(version) <= _PREVIEW


def preview(version: str) -> str | None:
    """What to say of a version that is supported as a preview; None for the others."""
    if not _LAST < release(version) <= _PREVIEW:
        return None
    return f"preview: Megatron-Core {version} is newer than what is tested ({TESTED})"


def require_supported() -> tuple[int, int]:
    """(major, minor) of the installed Megatron-Core.

    Raises:
        UnsupportedMegatron: it is not among the supported releases.
    """
    version = installed_version()
    if not is_supported(version):
        raise UnsupportedMegatron(f"Megatron-Core {version} is not supported; supported: {SUPPORTED}")
    return release(version)


@functools.cache
def say_preview() -> None:
    """Rank 0 says once that the installed Megatron-Core is supported as a preview, if it is."""
    text = preview(installed_version())
    if text is not None and int(os.environ.get("RANK", "0")) == 0:
        print(f"> moe-lbl: {text}", flush=True)
