"""MoE load-balancing loss for Megatron-Core with expert frequencies counted over the whole global batch.

Importing this package patches nothing; `register` (or the flag `--moe-lbl-scope` through the launcher) does.
Read `core/chunk.py` first: the main idea is there.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if sys.version_info < (3, 10):  # noqa: UP036  # from a folder on PYTHONPATH, which pip has not checked
    _error = "megatron_global_lbl needs Python 3.10 or later; this is Python {}.{}, {}".format(
        *sys.version_info[:2], sys.executable
    )
    raise SystemExit(_error) if sys.argv[:1] == ["-m"] else ImportError(_error)

if TYPE_CHECKING:
    from megatron_global_lbl.core.loss import load_balancing_loss
    from megatron_global_lbl.hook.versions import UnsupportedMegatron
    from megatron_global_lbl.registry import Handle, chunk, end_step, register, registered
    from megatron_global_lbl.settings import ConfigError, Scope

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "Handle",
    "Scope",
    "UnsupportedMegatron",
    "chunk",
    "end_step",
    "load_balancing_loss",
    "register",
    "registered",
]

# Imported when asked for: `megatron-lbl patch` must run where there is no PyTorch, on a login node for example.
_MODULES = {
    "ConfigError": "settings",
    "Handle": "registry",
    "Scope": "settings",
    "UnsupportedMegatron": "hook.versions",
    "chunk": "registry",
    "end_step": "registry",
    "load_balancing_loss": "core.loss",
    "register": "registry",
    "registered": "registry",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
