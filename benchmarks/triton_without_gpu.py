"""Triton's launch path without a GPU: kernels are really compiled for sm_90, and launched into a libcuda that does nothing.

Triton's own driver.c (its C launcher: reading the arguments, cuPointerGetAttribute per tensor, cuLaunchKernelEx) is built
against a stub of libcuda, so the whole host side runs except the driver: about 0.1 us per pointer and 2 to 4 us per launch on a
GPU are missing. The plugin's kernels then "run" on CPU tensors: their results are what was in the memory.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

BY_LIBRARY = {"cuLaunchKernelEx", "cuOccupancyMaxActiveClusters", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"}
SPECIAL = {
    "cuDeviceGetAttribute": "int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 10 ? 32 : 232448; return 0; }",
    "cuFuncGetAttribute": "int cuFuncGetAttribute(int *v, int a, void *f) { *v = 1024; return 0; }",
    "cuCtxGetCurrent": "int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }",
    "cuLaunchKernelEx": "long stub_launches; int cuLaunchKernelEx() { stub_launches++; return 0; }",
    "cuModuleLoadData": "int cuModuleLoadData(void **m, void *d) { *m = (void *)8; return 0; }",
    "cuModuleGetFunction": "int cuModuleGetFunction(void **f, void *m, char *n) { *f = (void *)16; return 0; }",
}


def install() -> Callable[[], int]:
    """Call it before the plugin's kernels are imported, without TRITON_INTERPRET. Gives what tells the launches so far."""
    assert os.environ.get("TRITON_INTERPRET") != "1"
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    folder = Path(tempfile.mkdtemp())
    called = re.findall(r"\b(cu[A-Z]\w+)\(", (Path(nvidia.dirname) / "driver.c").read_text(encoding="utf-8"))
    names = [name for name in sorted({*called, *BY_LIBRARY}) if name in SPECIAL or not name.endswith("Handle")]
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("\n".join(SPECIAL.get(name, f"int {name}() {{ return 0; }}") for name in names), encoding="utf-8")
    flags = ["-O2", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, "-o", str(library), str(source)], check=True)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(folder)

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    import megatron_global_lbl.core.fused.kernels  # noqa: F401  decorates the kernels, for this driver
    from megatron_global_lbl.core.fused import choice

    os.environ["MEGATRON_GLOBAL_LBL_FUSED"] = "1"
    choice._interpreted = lambda: True  # takes tensors on the CPU
    return lambda: ctypes.c_long.in_dll(stub, "stub_launches").value
