"""Trains a small GPT (MoE) with Megatron's own training loop, in the way that each release from 0.17 to 0.19 has it.

Like `pretrain_gpt.py`, which the wheels do not carry, it knows nothing of the plugin.
"""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.training import arguments, get_args, pretrain

NAMES = ("tokens", "labels", "loss_mask", "position_ids")


class Counting(torch.utils.data.Dataset):
    """Sample n counts upwards from n in steps of 1 to 3: the next token follows from the last two."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        args = get_args()
        text = (index * 7 + (1 + index % 3) * torch.arange(args.seq_length + 1)) % args.vocab_size
        return dict(zip(NAMES, (text[:-1], text[1:], torch.ones(args.seq_length), torch.arange(args.seq_length))))


def datasets_provider(samples, vp_stage=None):
    return [Counting(max(int(number or 0), 64)) for number in samples]


datasets_provider.is_distributed = True  # every rank reads for itself


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    config = config or arguments.core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def loss_func(loss_mask, losses):
    loss, tokens = losses.float().sum(), loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator, model):
    batch = {name: value.cuda() for name, value in next(data_iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"])


if __name__ == "__main__":
    if hasattr(arguments, "parse_and_validate_args"):  # 0.18 and later
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        config = pretrain_cfg_container_from_args(arguments.parse_and_validate_args())
        pretrain(
            cfg_container=config,
            train_valid_test_dataset_provider=datasets_provider,
            model_provider=model_provider,
            model_type=ModelType.encoder_or_decoder,
            forward_step_func=forward_step,
        )
    else:
        pretrain(datasets_provider, model_provider, ModelType.encoder_or_decoder, forward_step)
    assert mpu.model_parallel_is_initialized()
    torch.distributed.destroy_process_group()
