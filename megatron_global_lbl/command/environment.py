"""What is installed in this environment, as far as the plugin cares. Every line is found out here, nothing is assumed."""

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
    """Keep the import messages of Megatron and its friends out of the output: warnings, logging and whatever they print."""
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


def try_import(module: str) -> str | None:
    """Import a module in silence: None if that works, or the reason in one line."""
    with quiet():
        try:
            importlib.import_module(module)
        except BaseException as error:  # a broken extension may raise anything, SystemExit included
            return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


def version_of(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def folder_of(module: str) -> Path | None:
    """Where a top-level package lies; it is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin).parent if spec.origin else None


def gpus() -> str:
    """The GPUs that PyTorch sees, in words."""
    import torch

    if not torch.cuda.is_available():
        built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is built without CUDA"
        return f"none usable here ({built}); try launch scripts with `python -m megatron_global_lbl --cpu`"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return f"{', '.join(kinds)}, CUDA {torch.version.cuda}"


def transformer_engine() -> str:
    """Transformer Engine, in words."""
    if folder_of("transformer_engine") is None:
        return "not installed"
    version = version_of("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13", "transformer-engine-cu12")
    problem = try_import("transformer_engine.pytorch")
    return f"{version or 'of unknown version'}" + (f", but it does not import: {problem}" if problem else "")


def apex() -> str:
    """NVIDIA Apex, in words: told from the unrelated package that the public index has under the same name."""
    folder = folder_of("apex")
    extension = importlib.util.find_spec("amp_C") is not None
    if folder is None:
        return "not installed"
    if not (folder / "optimizers").is_dir() and not extension:
        return f"not installed: the package apex in {folder} is an unrelated project of the same name, not NVIDIA's"
    if not extension:
        return f"{folder}, but built without its CUDA extensions (no amp_C): its fused optimizers do not work"
    return f"{folder}, with its CUDA extensions (amp_C)"
