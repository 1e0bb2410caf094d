"""Stage 0: what is here."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

from stage import ROOT, Stage, paths

PACKAGES = ("triton", "numpy", "transformer-engine", "apex", "flash-attn")


def main() -> None:
    stage = Stage("versions")
    paths()
    import torch

    found: dict[str, str] = {"Python": platform.python_version(), "PyTorch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "there, without a version" if importlib.util.find_spec(package.replace("-", "_")) else "none"
    found["C compiler (Triton needs one)"] = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "none"
    stage.data["versions"] = found
    stage.save()
    with stage.check("a supported Megatron-Core"):
        from megatron_global_lbl.hook.versions import installed_version, require_supported

        found["megatron-core"] = str(installed_version())
        require_supported()
    found["commit"] = _line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    if stage.cpu:
        stage.skip("a CUDA device", "--cpu")
        return
    with stage.check("a CUDA device"):
        found["CUDA"] = str(torch.version.cuda)
        found["driver"] = _line(["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"])
        properties = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        found["GPUs"] = str(torch.cuda.device_count())
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))


def _line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


if __name__ == "__main__":
    main()
