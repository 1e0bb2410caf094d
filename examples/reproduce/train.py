"""The pre-training script of the experiments: Megatron's own training, and what a run leaves for the comparison.

Run through the plugin's launcher, which adds the flags of the load-balancing loss:

    python -m megatron_global_lbl --cpu examples/reproduce/train.py MEGATRON_ARGS --moe-lbl-scope global --reproduce-out FILE

It adds to `pretrain_gpt_moe.py` stacked experts (experts.py), balance losses that are no scope of the plugin (counting.py), and
the measurement (measure.py).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from pretrain_gpt_moe import datasets_provider, get_batch
from reproduce import counting
from reproduce.experts import use_stacked_experts
from reproduce.measure import Measurement

measurement = Measurement()


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses and the number of tokens; Megatron divides."""
    loss = torch.sum(losses.view(-1).float() * loss_mask.view(-1))
    num_tokens = loss_mask.sum().detach().to(torch.int)
    measurement.add_loss(loss.detach(), num_tokens)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch."""
    measurement.watch(model, get_args().curr_iteration)
    batch = get_batch(data_iterator)
    losses = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"])


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The arguments of this script."""
    group = parser.add_argument_group("experiments")
    group.add_argument("--reproduce-out", metavar="FILE", required=True, help="write what was measured (JSON)")
    group.add_argument("--reproduce-data", metavar="DIR", required=True, help="the folder with the held-out text")
    group.add_argument("--reproduce-count", metavar="KIND", default=None, help=counting.HELP)
    group.add_argument("--reproduce-stacked-experts", action="store_true", help="experts.py instead of SequentialMLP")
    return parser


def same_weights_whatever_the_micro_batch(seed: int) -> None:
    """Megatron warms up its fused functions with random numbers of the micro-batch's size before it makes the model; without a
    GPU they come from the generator that the weights come from."""
    make_model = training.setup_model_and_optimizer

    def seeded(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(seed)
        return make_model(*args, **kwargs)

    training.setup_model_and_optimizer = seeded


def main() -> None:
    """Megatron's own training, then the evaluation."""
    # Before the plugin is registered, which is when Megatron has its arguments: then it wraps these losses like Megatron's own.
    own = add_arguments(argparse.ArgumentParser(add_help=False)).parse_known_args()[0]
    if own.reproduce_count is not None:
        counting.install(own.reproduce_count)
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    same_weights_whatever_the_micro_batch(args.seed)
    if args.reproduce_stacked_experts:
        use_stacked_experts()
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    measurement.write(Path(args.reproduce_out), Path(args.reproduce_data))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
