"""CPU mode: real Megatron on gloo and CPU tensors, to try a launch script on a machine without a GPU.

    torchrun --nproc-per-node 4 -m megatron_global_lbl --cpu pretrain_gpt.py ARGS

It stands in for `torch.cuda`, and for the few places where Megatron fails without Transformer Engine or Apex. Model,
schedule, dispatchers, optimizer and checkpoints are Megatron's own code, run by Megatron's own training loop. What can only
work on a GPU is changed in the arguments, with one line on rank 0 per change. The plugin loads this package
only when `--cpu` asks for it; this package knows nothing of the plugin and serves without it, too:

    import megatron_cpu

    megatron_cpu.install()  # before anything of Megatron is imported

What a run in CPU mode does NOT show: speed, memory, NCCL, fused kernels and Transformer Engine, CUDA graphs, the hiding of
communication behind compute (every stream is the one CPU thread), and anything about context parallelism's attention, which
Megatron has in Transformer Engine only.

| file | idea |
|---|---|
| `cuda.py` | the names in `torch.cuda`, and one function mode that turns every CUDA device into the CPU |
| `megatron.py` | what in Megatron itself assumes the libraries of a GPU machine (Transformer Engine, Apex) |
| `gloo.py` | the one collective that gets its arguments in another form |
| `arguments.py` | the flags that only work on a GPU, each with its replacement and the reason |

gloo itself has every collective and data type that Megatron's training loop uses (PyTorch 2.13).
"""

from __future__ import annotations

import os
import sys

_installed = False


def install() -> None:
    """Make this process run Megatron on the CPU. Call it before anything of Megatron is imported; a second time only what
    depends on the environment and the command line is set, to those of then."""
    global _installed
    # A GPU that is present stays unused; NCCL and CUDA libraries do not even see it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Megatron's fused functions are `torch.compile`d. Their plain form computes the same, and compiling them for the CPU
    # takes minutes. Read when `torch._dynamo` is imported, so it comes before anything of torch.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron asks for this with tensor parallelism on the GPUs it believes to have; scripts for other GPUs leave it out. Its
    # FSDP refuses it.
    if "--use-megatron-fsdp" not in sys.argv:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    from megatron_cpu import cuda, gloo

    cuda.take_place()
    if _installed:
        return
    _installed = True
    cuda.install()
    gloo.install()

    # Only now may Megatron be imported: it looks at torch.cuda while it is.
    from megatron_cpu import arguments, megatron

    megatron.install()
    arguments.install()
