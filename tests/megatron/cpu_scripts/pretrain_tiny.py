"""A tiny GPT (MoE) on `megatron.training`, with data that can be learned in a few steps.

Every rank with a loss prints each training micro-batch's loss exactly, as hexadecimal: "LOSS iteration data_rank value".
"""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

NAMES = ("tokens", "labels", "loss_mask", "position_ids")


class Counting(torch.utils.data.Dataset):
    """Sample n counts upwards from n in steps of 1 to 3: the next token follows from the last two."""

    def __init__(self, samples: int, length: int, vocabulary: int) -> None:
        self.samples, self.length, self.vocabulary = samples, length, vocabulary

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = (index * 7 + (1 + index % 3) * torch.arange(self.length + 1)) % self.vocabulary
        positions = torch.arange(self.length)
        return dict(zip(NAMES, (text[:-1], text[1:], torch.ones(self.length), positions)))


def datasets_provider(samples, vp_stage=None):
    args = get_args()
    return [Counting(max(int(n or 0), 64), args.seq_length, args.vocab_size) for n in samples]


datasets_provider.is_distributed = True  # every rank reads for itself


def loss_func(loss_mask, training, losses):
    loss, tokens = losses.float().sum(), loss_mask.sum().to(torch.int)
    if training and mpu.get_tensor_model_parallel_rank() == 0:
        mean = (loss / tokens).item()
        print(f"LOSS {get_args().curr_iteration + 1} {mpu.get_data_parallel_rank()} {mean.hex()}", flush=True)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator, model):
    batch = {name: value.cuda() for name, value in next(data_iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"], model.training)


if __name__ == "__main__":
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    torch.distributed.destroy_process_group()
