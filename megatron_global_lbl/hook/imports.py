"""Waiting for a module of Megatron that is not imported yet: `register` may come before a script's imports."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Undo = Callable[[], None]


def when_imported(name: str, then: Callable[[], None]) -> Undo:
    """Call `then` once the module `name` is imported, and no module of its top-level package is half imported in that thread.

    An error of `then` is one of the import that it ends, and comes again with the next: a script may catch it once.

    Returns:
        What ends the waiting; without effect once `then` was called.
    """
    if name in sys.modules:
        then()
        return lambda: None
    finder = _Finder(name, then)
    sys.meta_path.insert(0, finder)
    return finder.leave


class _Finder(MetaPathFinder):
    """Finds the modules of one package as the others would, and counts how deep their imports are nested."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then
        self._package = name.partition(".")[0] + "."
        self._thread = threading.local()

    def leave(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(self._package):
            return None
        for other in sys.meta_path:
            spec = None if other is self or not hasattr(other, "find_spec") else other.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:  # of a namespace package
                    spec.loader = _Counting(spec.loader, self)
                return spec
        return None

    def execute(self, loader: Any, module: ModuleType) -> None:
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            loader.exec_module(module)
        finally:
            self._thread.depth -= 1
        if self._thread.depth == 0 and self._name in sys.modules and self in sys.meta_path:
            self.leave()  # `then` imports modules of the package itself
            try:
                self._then()
            except BaseException:
                sys.meta_path.insert(0, self)
                raise


class _Counting(Loader):
    """Loads as `loader` does; the module keeps `loader` as its own."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # runpy asks for the code, others for resources

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._finder.execute(self._loader, module)
