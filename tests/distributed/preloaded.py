"""What the fork server imports before it forks a rank (ranks.py): PyTorch and Megatron in CPU mode, nothing of the plugin."""

import gc
import os
from contextlib import suppress

os.environ["OMP_NUM_THREADS"] = "1"
# Before anything imports Triton: so that a case can run the kernels (MEGATRON_GLOBAL_LBL_FUSED=1).
os.environ["TRITON_INTERPRET"] = "1"

import megatron_cpu

megatron_cpu.install()

import megatron.core.distributed  # noqa: E402
import megatron.core.transformer.moe.moe_layer  # noqa: E402

with suppress(ModuleNotFoundError):  # not in the wheels before 0.17
    import megatron.training.training  # noqa: F401

# What is here now stays: the collection after every case (workers.py) need not look at it, nor write into shared pages.
gc.freeze()
