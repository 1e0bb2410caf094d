"""What outlives a step, as one file more in the folder of a framework's checkpoint: the window, and the completed steps that
`start_iter` counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_global_lbl.hook.checkpoint import of_all_stages, say

if TYPE_CHECKING:
    from megatron_global_lbl.registry import Handle

FILE = "moe_lbl.pt"


def save(handle: Handle, model: list, folder: str | Path) -> None:
    """Every rank calls it, after the checkpoint was written; rank 0 writes.

    Args:
        handle: of the registration.
        model: its chunks on this rank.
        folder: the checkpoint's.
    """
    state = handle.state_dict(model)
    state["layers"] = of_all_stages(state["layers"])
    if dist.get_rank() == 0:
        torch.save(state, Path(folder) / FILE)


def load(handle: Handle, model: list, folder: str | Path) -> None:
    """Every rank calls it, before the first step; a checkpoint without the file starts both anew, which is said.

    Args:
        handle, model, folder: as for `save`.
    """
    file = Path(folder) / FILE
    if file.exists():
        handle.load_state_dict(torch.load(file, weights_only=True), model)
    else:
        say(f"no {file}: the window and the count of steps start anew")
