"""The metrics in Megatron's own log (`megatron.training.training`, 0.14 to 0.19): its line, TensorBoard and W&B.

Replaced is `training_log`, which every rank calls after every iteration. At a log interval's end the metrics are gathered,
given to the writers that Megatron has on the last rank, and put among the losses whose means its line shows.
"""

from __future__ import annotations

import inspect
from typing import Protocol

import torch

from megatron_global_lbl.hook.patching import Patches

TRAINING = "megatron.training.training"
IN_LINE = ("max_vio", "dead", "balance_sequences")
"""On the console; TensorBoard and W&B have all."""


class Shown(Protocol):
    """What the log shows.

    Attributes:
        is_in_log: set once the log tells it of every interval's end.
    """

    is_in_log: bool

    def log(self, log_interval: int, iteration: int) -> dict[str, float]:
        """A log interval ends, with this 1-based iteration; numbers by key. A collective."""


def install(patches: Patches, metrics: Shown) -> None:
    """Let every log interval end with its metrics."""

    def wrap(original):
        signature = inspect.signature(original)

        def training_log(*args, **kwargs):
            from megatron.training import global_vars

            arguments = signature.bind(*args, **kwargs).arguments
            iteration, log_interval = arguments["iteration"], global_vars.get_args().log_interval
            if iteration % log_interval == 0:
                values = metrics.log(log_interval, iteration)
                _write(values, iteration)
                _put_in_line(values, arguments["total_loss_dict"], bool(arguments["skipped_iter"]))
            return original(*args, **kwargs)

        return training_log

    patches.wrap(TRAINING, "training_log", wrap)
    metrics.is_in_log = True


def _write(values: dict[str, float], iteration: int) -> None:
    """On the last rank, the only one with writers."""
    from megatron.training import global_vars

    writer, wandb_writer = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
    if writer:
        for key, value in values.items():
            writer.add_scalar(key, value, iteration)
    if wandb_writer and values:
        wandb_writer.log(values, iteration)


def _put_in_line(values: dict[str, float], total_loss_dict: dict, skipped: bool) -> None:
    """Megatron divides each total by the iterations that were not skipped, this one included, and forgets it."""
    iterations = max(1, total_loss_dict.get("advanced iterations", 0) + (not skipped))
    for key, value in values.items():
        if key.rpartition("/")[2] in IN_LINE:
            total_loss_dict[key] = torch.tensor([value * iterations], dtype=torch.float64)
