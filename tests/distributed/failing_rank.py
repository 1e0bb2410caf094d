"""A training in which rank 1 fails in the second micro-batch, with a reduction of the loss under way: for torchrun."""

import torch.distributed as dist

import megatron_cpu

megatron_cpu.install()
dist.init_process_group("gloo")

import harness  # noqa: E402
import toy  # noqa: E402
from layout import Layout  # noqa: E402
from truth import Problem  # noqa: E402

forwards = 0
original = toy.Block.compute


def compute(self, h, padding):
    global forwards
    result = original(self, h, padding)
    forwards += 1
    if dist.get_rank() == 1 and forwards == 3:
        raise RuntimeError("this rank fails")
    return result


toy.Block.compute = compute
harness.run(Problem("global", 2, 3, 2, layers=2), Layout(), {"scope": "global"})
