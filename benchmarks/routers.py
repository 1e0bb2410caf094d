"""The routers that the benchmarks compare: the losses that can be attached to a router, in Megatron and in the plugin.

Shape suffixes: T tokens of this rank in one micro-batch, H hidden size, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from models import ModelSize
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """A load-balancing loss.

    Attributes:
        upstream: Megatron's `--moe-router-load-balancing-type`.
        register: arguments of `megatron_global_lbl.register`; None for Megatron alone.
        plain: never by the Triton kernels, which a GPU would run.
    """

    upstream: str
    register: tuple[tuple[str, str], ...] | None = None
    plain: bool = False

    @contextmanager
    def active(self, *chunks: nn.Module) -> Iterator[Any]:
        """Megatron with this loss while inside; gives the registration's handle, if there is one.

        Args:
            chunks: model chunks that Megatron's DDP does not wrap.
        """
        import megatron_global_lbl as lbl

        with plain_path() if self.plain else nullcontext():
            with lbl.registered(**dict(self.register)) if self.register else nullcontext() as handle:
                for chunk in chunks if self.register else ():
                    lbl.chunk(chunk)
                yield handle

    @property
    def has_metrics(self) -> bool:
        """Micro-batches are recorded."""
        return "metrics" in dict(self.register or ())

    def choose(self, model: list[nn.Module]) -> None:
        """Let the routers of a model use Megatron's side of this loss; the model was built with both `aux_loss` and
        `global_aux_loss`, and so has the state that either needs."""
        from megatron.core.transformer.moe.router import TopKRouter

        for router in (module for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)):
            router.routing_type = self.upstream
            router.config.moe_aux_loss_coeff = COEFF


@contextmanager
def plain_path() -> Iterator[None]:
    """What is registered while inside computes the loss in PyTorch."""
    before = os.environ.get(FUSED_VARIABLE)
    os.environ[FUSED_VARIABLE] = "0"
    try:
        yield
    finally:
        del os.environ[FUSED_VARIABLE]
        if before is not None:
            os.environ[FUSED_VARIABLE] = before


FUSED_VARIABLE = "MEGATRON_GLOBAL_LBL_FUSED"
VARIANTS = {
    "none": Variant("none"),
    "aux_loss": Variant("aux_loss"),
    "global_aux_loss": Variant("global_aux_loss"),
    "dp": Variant("aux_loss", (("scope", "dp"),)),
    "global": Variant("aux_loss", (("scope", "global"),)),
    # With the metrics that Megatron's log shows.
    "dp brief": Variant("aux_loss", (("scope", "dp"), ("metrics", "brief"))),
    "global brief": Variant("aux_loss", (("scope", "global"), ("metrics", "brief"))),
    "global detailed": Variant("aux_loss", (("scope", "global"), ("metrics", "detailed"))),
    # The others are these on a machine without a GPU.
    "dp plain": Variant("aux_loss", (("scope", "dp"),), plain=True),
    "global plain": Variant("aux_loss", (("scope", "global"),), plain=True),
}
DEFAULT_VARIANTS = [name for name in VARIANTS if " " not in name]
STEP_VARIANTS = ["aux_loss", "global_aux_loss", "dp", "global", "global brief"]
BASELINE = "none"
COEFF = 1e-2


def start(*, gpu: bool) -> None:
    """Process group and Megatron's groups for torchrun's ranks, or for one rank without torchrun."""
    backend = "nccl" if gpu else "gloo"
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    start_megatron()


def start_megatron(*, gloo: bool = True) -> None:
    """Megatron's groups in a process group that exists: all ranks data-parallel."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(create_gloo_process_groups=gloo)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def stop() -> None:
    """Undo `start`."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class Stack(nn.Module):
    """The routers of a model chunk on one input: a call is a micro-batch, and gives their probabilities.

    Attributes:
        recompute: every router is recomputed in the backward.
    """

    def __init__(self, routers: list[nn.Module], recompute: bool = False) -> None:
        super().__init__()
        self.routers, self.recompute = nn.ModuleList(routers), recompute

    def forward(self, hidden: Tensor) -> list[Tensor]:
        if self.recompute:
            from megatron.core.tensor_parallel import checkpoint

            return [checkpoint(lambda x, router=router: router(x)[0], False, hidden) for router in self.routers]
        return [router(hidden)[0] for router in self.routers]


def build(model: ModelSize, variant: Variant, router_dtype: str | None, *, layers: int) -> Stack:
    """Megatron's `TopKRouter`s of a bf16 model, on the device, in training mode.

    Args:
        model: its size.
        variant: its loss; enter `variant.active(stack)` around forward and backward.
        router_dtype: Megatron's `--moe-router-dtype`; None computes the logits in bf16.
        layers: how many.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter

    options = dict(model.router)
    if variant.upstream != "none":
        options["moe_aux_loss_coeff"] = COEFF
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=model.hidden,
        num_attention_heads=8,
        num_moe_experts=model.experts,
        moe_router_topk=model.topk,
        moe_router_load_balancing_type=variant.upstream,
        moe_router_dtype=router_dtype,
        bf16=True,
        params_dtype=torch.bfloat16,
        add_bias_linear=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        **options,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    routers = [TopKRouter(config=config, pg_collection=groups) for _ in range(layers)]
    for number, router in enumerate(routers, 1):
        router.set_layer_number(number)
    # As the schedule does before each backward, with 8 micro-batches.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device_of_tensors()) / 8)
    # What Float16Module does to a model, buffers included.
    return Stack(routers).bfloat16().to(device_of_tensors()).train()


def device_of_tensors() -> torch.device:
    """Where tensors are: CPU mode replaces `torch.cuda`, so it cannot be asked."""
    return torch.empty(0, device="cuda").device


def micro_batch(model: ModelSize, tokens: int) -> tuple[Tensor, Tensor]:
    """Input [T, 1, H] of the router, and the gradient [T, E] of its probabilities."""
    device = device_of_tensors()
    generator = torch.Generator(device).manual_seed(1 + dist.get_rank())
    hidden = torch.randn(tokens, 1, model.hidden, generator=generator, device=device).bfloat16()
    gradient = torch.randn(tokens, model.experts, generator=generator, device=device)
    return hidden.requires_grad_(), gradient


def backward(outputs: list[Tensor], gradient: Tensor) -> None:
    """That of a micro-batch, with the same gradient of every router's probabilities."""
    torch.autograd.backward(outputs, [gradient.to(outputs[0].dtype)] * len(outputs))


def end_of_step(stack: Stack) -> None:
    """What happens once per step for these losses: the plugin's step end, upstream's reset."""
    import megatron_global_lbl as lbl

    lbl.end_step()
    for router in stack.routers:
        router.reset_global_aux_loss_tracker()
