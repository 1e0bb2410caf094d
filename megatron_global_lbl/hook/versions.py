"""Which Megatron-Core is installed, and which releases the hook was made for."""

from __future__ import annotations

import importlib
import importlib.util

SUPPORTED = "0.14 to 0.19"
_FIRST, _LAST = (0, 14), (0, 19)


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


def require_supported() -> tuple[int, int]:
    """(major, minor) of the installed Megatron-Core.

    Raises:
        UnsupportedMegatron: it is not among the supported releases.
    """
    version = installed_version()
    if not _FIRST <= release(version) <= _LAST:
        raise UnsupportedMegatron(f"Megatron-Core {version} is not supported; supported: {SUPPORTED}")
    return release(version)
