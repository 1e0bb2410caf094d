"""What the trainings of all frameworks share: their environment, and what two of them are compared by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


def environment(framework: Path, *paths: Path) -> dict[str, str]:
    """Of a process that imports a framework from its folder, the plugin, this folder and `paths`, and has no GPU."""
    folders = [framework, HERE.parents[1], HERE, *paths]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def checksum(modules: Iterable[nn.Module]) -> str:
    """SHA-256 of all parameters: equal for trainings that are so bit by bit."""
    numbers = torch.cat([parameter.detach().float().flatten() for module in modules for parameter in module.parameters()])
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()
