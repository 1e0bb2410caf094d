"""Replacing a symbol of Megatron in five steps (import, check, mark, keep, install), and the undo."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_global_lbl.hook.versions import SUPPORTED, UnsupportedMegatron, installed_version

_MARK = "__megatron_global_lbl__"


class _Installed(NamedTuple):
    path: str
    owner: Any
    name: str
    original: Any
    own: bool  # the owner had it itself, and did not inherit it
    replacement: Any

    @property
    def is_there(self) -> bool:
        return vars(self.owner).get(self.name) is self.replacement


def _definer(owner: type, name: str, module_name: str) -> type:
    """The class of the module that defines a method: `owner` itself, or one above it if a framework has replaced the class by a
    subclass."""
    definers = [c for c in owner.__mro__ if name in vars(c)]
    return next((c for c in definers if c.__module__ == module_name), owner)


class Patches:
    """Symbols replaced by one registration."""

    def __init__(self) -> None:
        self._installed: list[_Installed] = []

    def wrap(self, module_name: str, symbol: str, make: Callable[[Callable], Callable], *, inherited: bool = False) -> None:
        """Replace `symbol` ("function" or "Class.method") of a module by `make(original)`.

        Args:
            module_name: the module.
            symbol: the function in it.
            make: gives the replacement.
            inherited: the class may have it from a class above.

        Raises:
            UnsupportedMegatron: the module or the symbol is not there, or is replaced already.
        """
        path = f"{module_name}.{symbol}"
        try:
            owner: Any = importlib.import_module(module_name)
            *outer, name = symbol.split(".")
            for part in outer:
                owner = getattr(owner, part)
            if isinstance(owner, type) and not inherited:
                owner = _definer(owner, name, module_name)
            original = getattr(owner, name) if inherited else vars(owner)[name]
        except (ModuleNotFoundError, AttributeError, KeyError) as error:
            if isinstance(error, ModuleNotFoundError) and not f"{module_name}.".startswith(f"{error.name}."):
                raise  # a module of somebody else, which this one needs
            raise UnsupportedMegatron(
                f"{path} is not where it should be in Megatron-Core {installed_version()}; supported: {SUPPORTED}"
            ) from error
        if hasattr(original, _MARK):
            raise UnsupportedMegatron(f"{path} is replaced already by another copy of megatron_global_lbl")
        replacement = functools.wraps(original)(make(original))
        setattr(replacement, _MARK, path)
        self._installed.append(_Installed(path, owner, name, original, name in vars(owner), replacement))
        setattr(owner, name, replacement)

    @property
    def paths(self) -> list[str]:
        """Dotted paths of what is replaced."""
        return [entry.path for entry in self._installed]

    @property
    def lost(self) -> list[str]:
        """Dotted paths of what somebody else has replaced since."""
        return [entry.path for entry in self._installed if not entry.is_there]

    def restore(self) -> None:
        """Put every original back, the latest first.

        Raises:
            RuntimeError: somebody else has replaced a symbol since; that symbol is left to them, all others are restored.
        """
        foreign = []
        for entry in reversed(self._installed):
            if not entry.is_there:
                foreign.append(entry.path)
            elif entry.own:
                setattr(entry.owner, entry.name, entry.original)
            else:
                delattr(entry.owner, entry.name)
        self._installed.clear()
        if foreign:
            raise RuntimeError(f"replaced by somebody else since, so not restored: {', '.join(foreign)}")
