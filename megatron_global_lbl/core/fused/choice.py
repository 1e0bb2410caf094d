"""Which forwards the kernels take; the plain path takes all others, with the same loss.

The environment variable MEGATRON_GLOBAL_LBL_FUSED, read by `register`:

| value | the kernels take |
|---|---|
| not set | what they can on a CUDA device, where Triton can be imported |
| 0 | nothing |
| 1 | the same, but Triton must be there; and tensors on the CPU, too, in a process that was started with TRITON_INTERPRET=1 |

`handle.loss_paths` says which path each layer's last forward took, and why.
"""

from __future__ import annotations

import functools
import os
from enum import Enum

import torch
from torch import Tensor

from megatron_global_lbl.settings import ConfigError

VARIABLE = "MEGATRON_GLOBAL_LBL_FUSED"
FUSED = "fused: Triton kernels on the logits"
SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_EXPERTS = 4096


class Choice(Enum):
    """What the environment variable says."""

    AUTOMATIC = None
    NEVER = "0"
    REQUIRED = "1"

    @staticmethod
    def read() -> Choice:
        """
        Raises:
            ConfigError: a value that is not allowed, or 1 without Triton.
        """
        value = os.environ.get(VARIABLE) or None
        try:
            choice = Choice(value)
        except ValueError:
            raise ConfigError(f"the environment variable {VARIABLE} {value}: unknown; allowed: 0, 1, or not set") from None
        problem = triton_problem() if choice is Choice.REQUIRED else None
        if problem is not None:
            raise ConfigError(f"the environment variable {VARIABLE} 1: {problem}; allowed: where Triton can be imported")
        return choice


def on_gpu() -> str:
    """Which path the loss takes on a GPU as far as the environment says, in words."""
    try:
        choice = Choice.read()
    except ConfigError as error:
        return f"NONE: {error}"
    problem = f"{VARIABLE} is 0" if choice is Choice.NEVER else triton_problem()
    return FUSED if problem is None else f"plain: {problem}"


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken build may raise anything
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def why_not(choice: Choice, logits: Tensor, score_function: str | None) -> str | None:
    """None if the kernels can take these logits; otherwise why not.

    Args:
        choice: the user's.
        logits: [T, E].
        score_function: Megatron's name of it; None if its scores for these logits are not those of the kernels.
    """
    if choice is Choice.NEVER:
        return f"{VARIABLE} is 0"
    if not logits.is_cuda and not (choice is Choice.REQUIRED and logits.device.type == "cpu" and _interpreted()):
        return f"tensors on {logits.device.type}"
    if score_function not in SCORE_FUNCTIONS:
        return "another score function"
    if logits.dtype not in DTYPES:
        return f"logits of {str(logits.dtype).removeprefix('torch.')}"
    if logits.shape[1] > MOST_EXPERTS:
        return f"more than {MOST_EXPERTS} experts"
    return triton_problem() if choice is Choice.AUTOMATIC else None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
