"""ms-swift's own `megatron pt` on two ranks without a GPU. Its imports take longer than a training of the tests, so they are
made once: each line of standard input is one training, {"arguments": [those of `megatron pt`], "log": its file}, whose ranks
are forked from here; each line of the answer is the training's error, or empty."""
# ruff: noqa: E402

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import socket
import sys

RANKS = 2
os.environ["LOCAL_WORLD_SIZE"] = str(RANKS)

import megatron_cpu

megatron_cpu.install()
# Before the stand-in: Megatron-Core asks at its import what is installed.
import megatron.core.extensions.transformer_engine as te_layers
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.transformer.moe.moe_layer  # noqa: F401
import torch
from absent import stand_in_for

# mcore-bridge asks whether a layer is one of Transformer Engine's. Without that package Megatron-Core has no such classes:
# here they are classes that no layer is of.
for name in dir(te_layers):
    if name.startswith("TE") and not isinstance(getattr(te_layers, name), type):
        setattr(te_layers, name, type(name, (torch.nn.Module,), {}))

with stand_in_for("transformer_engine"):
    import mcore_bridge.model  # noqa: F401
    from mcore_bridge.bridge import GPTBridge
    from mcore_bridge.model.constant import ModelType
    from mcore_bridge.model.register import ModelLoader, ModelMeta, get_model_meta, register_model
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from swift.megatron import megatron_pretrain_main  # noqa: F401


class Loader(ModelLoader):
    """mcore-bridge's model, built of Megatron-Core's own layers. Its own loader knows Transformer Engine's only."""

    def get_transformer_layer_spec(self, vp_stage=None):
        config = self.config
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
        )
        self._deepcopy_layer_spec(spec)
        return spec


class Bridge(GPTBridge):
    """Reads no weights: mcore-bridge maps them to the names of Transformer Engine's layers."""

    def load_weights(self, *args, **kwargs) -> None:
        """The model keeps what it was initialised with."""


gpt = get_model_meta(ModelType.gpt)
register_model(ModelMeta(ModelType.gpt, gpt.model_types, bridge_cls=Bridge, loader=Loader), exist_ok=True)


def run_rank(rank: int, port: int, arguments: list[str], log: str) -> None:
    """One rank, as torchrun would start it."""
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["megatron pt", *arguments]
    runpy.run_path(importlib.util.find_spec("swift.cli._megatron.pt").origin, run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    for line in sys.stdin:
        training = json.loads(line)
        error = ""
        try:
            torch.multiprocessing.start_processes(
                run_rank, (free_port(), training["arguments"], training["log"]), nprocs=RANKS, start_method="fork"
            )
        except Exception as failure:
            error = str(failure)
        print(json.dumps(error), flush=True)
