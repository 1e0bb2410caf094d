"""What the commands that show something need beyond the plugin itself, which brings nothing along."""

from __future__ import annotations

import importlib.util


def missing_extra(*modules: str) -> str | None:
    """The error for modules that are not installed; None if all are."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; pip install '.[report]' in the plugin's source tree" if missing else None
