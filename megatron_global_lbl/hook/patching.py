"""Replacing a symbol of Megatron in five steps (import, check, mark, keep, install), and the undo."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from megatron_global_lbl.hook.versions import SUPPORTED, UnsupportedMegatron, installed_version

_MARK = "__megatron_global_lbl__"


class Patches:
    """Symbols replaced by one registration."""

    def __init__(self) -> None:
        self._installed: list[tuple[str, Any, str, Any, Any]] = []

    def wrap(self, module_name: str, symbol: str, make: Callable[[Callable], Callable]) -> None:
        """Replace `symbol` ("function" or "Class.method") of a module by `make(original)`.

        Raises:
            UnsupportedMegatron: the module or the symbol is not there, or is replaced already.
        """
        path = f"{module_name}.{symbol}"
        try:
            owner: Any = importlib.import_module(module_name)
            *outer, name = symbol.split(".")
            for part in outer:
                owner = getattr(owner, part)
            # From the owner's own dictionary: an inherited method is not this symbol.
            original = vars(owner)[name]
        except (ModuleNotFoundError, AttributeError, KeyError) as error:
            raise UnsupportedMegatron(
                f"{path} is not where it should be in Megatron-Core {installed_version()}; supported: {SUPPORTED}"
            ) from error
        if hasattr(original, _MARK):
            raise UnsupportedMegatron(f"{path} is replaced already by another copy of megatron_global_lbl")
        replacement = functools.wraps(original)(make(original))
        setattr(replacement, _MARK, path)
        self._installed.append((path, owner, name, original, replacement))
        setattr(owner, name, replacement)

    @property
    def paths(self) -> list[str]:
        """Dotted paths of what is replaced."""
        return [path for path, *_ in self._installed]

    @property
    def lost(self) -> list[str]:
        """Dotted paths of what somebody else has replaced since."""
        return [path for path, owner, name, _, replacement in self._installed if vars(owner)[name] is not replacement]

    def restore(self) -> None:
        """Put every original back, the latest first.

        Raises:
            RuntimeError: somebody else has replaced a symbol since; that symbol is left to them, all others are restored.
        """
        foreign = []
        for path, owner, name, original, replacement in reversed(self._installed):
            if vars(owner)[name] is replacement:
                setattr(owner, name, original)
            else:
                foreign.append(path)
        self._installed.clear()
        if foreign:
            raise RuntimeError(f"replaced by somebody else since, so not restored: {', '.join(foreign)}")
