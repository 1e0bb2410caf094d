"""Stands in for packages that a framework imports at its start and that nothing trained here uses: Transformer Engine for its
LoRA layers, ModelOpt for distilled and quantised models, nvidia-resiliency-ext for restarts, Energon for pictures."""

from __future__ import annotations

import importlib.machinery
import sys
import types


class _Absent(types.ModuleType):
    """Any name is there: an empty class to derive from, or if its name is in lower case one that does nothing."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        import torch

        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}") if name.islower() else type(name, (torch.nn.Module,), {})

    def __call__(self, *args, **kwargs) -> None:
        """No state of it to save, restore or adjust."""


class _Finder:
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module) -> None:
        """Nothing to run."""


class stand_in_for:
    """While inside, `import NAME` succeeds; afterwards Megatron's own questions whether it is installed are answered truly."""

    def __init__(self, *names: str) -> None:
        self._finder = _Finder(names)

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self._finder)

    def __exit__(self, *_) -> None:
        sys.meta_path.remove(self._finder)
        for name in list(sys.modules):
            if isinstance(sys.modules[name], _Absent):
                del sys.modules[name]
