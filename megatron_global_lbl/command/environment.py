"""What is installed in this environment, in words, for `megatron-lbl doctor`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, logging and whatever an import prints."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    disabled = logging.root.manager.disable
    with open(os.devnull, "w") as nothing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            for stream in (1, 2):
                os.dup2(nothing.fileno(), stream)
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                yield
        finally:
            logging.disable(disabled)
            for stream, original in zip((1, 2), kept):
                os.dup2(original, stream)
                os.close(original)


def import_lightly() -> None:
    """For the rest of this process leave out what takes half of Megatron's import: compiled functions and W&B."""
    import torch

    def compile_nothing(function=None, **_):
        return compile_nothing if function is None else function

    torch.compile = compile_nothing  # type: ignore[assignment]
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]


def try_import(module: str) -> str | None:
    """Import a module without output. Returns None, or the reason for a failure in one line."""
    with quiet():
        try:
            importlib.import_module(module)
        except BaseException as error:  # a broken extension may raise anything, SystemExit included
            return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


def folder_of(module: str) -> Path | None:
    """Where a top-level package lies; it is not imported."""
    spec = importlib.util.find_spec(module)
    return next(map(Path, (spec and spec.submodule_search_locations) or []), None)


def gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is built without CUDA"
        return f"none usable here ({built}); try launch scripts with `python -m megatron_global_lbl --cpu`"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return f"{', '.join(kinds)}, CUDA {torch.version.cuda}"


def transformer_engine() -> str:
    if folder_of("transformer_engine") is None:
        return "not installed"
    version = "of unknown version"
    for name in ("transformer-engine-cu12", "transformer-engine-cu13", "transformer-engine-torch", "transformer-engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
    problem = try_import("transformer_engine.pytorch")
    return version + (f", but it does not import: {problem}" if problem else "")


def apex() -> str:
    """NVIDIA's; the public index has an unrelated package of the same name."""
    folder = folder_of("apex")
    if folder is None:
        return "not installed"
    if importlib.util.find_spec("amp_C") is not None:
        return f"{folder}, with its CUDA extensions (amp_C)"
    if (folder / "optimizers").is_dir():
        return f"{folder}, but built without its CUDA extensions (no amp_C): its fused optimizers do not work"
    return f"not installed: the package apex in {folder} is an unrelated project of the same name, not NVIDIA's"
