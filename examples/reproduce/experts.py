"""The experts of one MoE layer as two stacked weights: Megatron's `SequentialMLP`, made for a CPU that has to run 64 of them.

`SequentialMLP` calls two linear modules per expert, forward and backward: at 64 small experts the calls cost many times the
arithmetic. Here a layer has one weight [E, 2F, H] and one [E, H, F], and a loop over matrix products only. The products and
their order are the same, so output and gradients are `SequentialMLP`'s bit by bit (tests/unit/test_reproduce_parts.py).

Shape suffixes: N routed (token, choice) pairs by expert, E experts, H hidden, F an expert's width, I to O of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


def use_stacked_experts() -> None:
    """Megatron's specification for plain PyTorch gets these experts; call it before the model is built."""
    from megatron.core.models.backends import LocalSpecProvider

    LocalSpecProvider.grouped_mlp_modules = lambda self, moe_use_grouped_gemm: StackedExperts  # type: ignore[method-assign]


class StackedExperts(nn.Module):
    """SwiGLU experts without biases on one expert-parallel and tensor-parallel rank."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None, name: str | None = None) -> None:
        super().__init__()
        alone = config.expert_model_parallel_size == config.expert_tensor_parallel_size == 1
        if not alone or config.add_bias_linear or config.activation_func is not functional.silu or not config.gated_linear_unit:
            raise SystemExit("the stacked experts are SwiGLU without biases, on one expert-parallel and tensor-parallel rank")
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        self.fc1_E2FH = nn.Parameter(torch.empty(num_local_experts, 2 * width, hidden))
        self.fc2_EHF = nn.Parameter(torch.empty(num_local_experts, hidden, width))
        with torch.no_grad():
            for expert in range(num_local_experts):  # the order in which SequentialMLP draws its random numbers
                config.init_method(self.fc1_E2FH[expert])
                config.output_layer_init_method(self.fc2_EHF[expert])

    def forward(self, hidden_NH: Tensor, tokens_per_expert: Tensor, probs_N: Tensor) -> tuple[Tensor, None]:
        """What Megatron's dispatcher hands to a layer's experts, and takes back."""
        sizes = tokens_per_expert.tolist()
        gate_NF, up_NF = _Products.apply(hidden_NH, self.fc1_E2FH, sizes).chunk(2, dim=-1)
        inner_NF = functional.silu(gate_NF) * up_NF * probs_N.unsqueeze(-1)
        return _Products.apply(inner_NF, self.fc2_EHF, sizes), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """For `--ckpt-format torch` only, which has no use for it."""
        raise NotImplementedError("stacked experts are saved with --ckpt-format torch")


def _without_function_modes(call: Callable[..., Any]) -> Callable[..., Any]:
    """The CPU mode looks at every call of PyTorch; hundreds of small products have nothing for it to see."""

    @wraps(call)
    def inside(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return call(*args)

    return inside


class _Products(torch.autograd.Function):
    """Each expert's rows times its weight, transposed."""

    @staticmethod
    @_without_function_modes
    def forward(ctx: Any, rows_NI: Tensor, weight_EOI: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows_NI, weight_EOI)
        ctx.sizes = sizes
        out_NO = rows_NI.new_empty(len(rows_NI), weight_EOI.shape[1])
        for rows_I, weight_OI, out_O in zip(rows_NI.split(sizes), weight_EOI, out_NO.split(sizes)):
            if len(rows_I):
                torch.mm(rows_I, weight_OI.t(), out=out_O)
        return out_NO

    @staticmethod
    @_without_function_modes
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_NI, weight_EOI = ctx.saved_tensors
        grad_NO = gradients[0].contiguous()
        grad_rows_NI, grad_weight_EOI = torch.empty_like(rows_NI), torch.zeros_like(weight_EOI)
        parts = zip(
            rows_NI.split(ctx.sizes), weight_EOI, grad_NO.split(ctx.sizes), grad_rows_NI.split(ctx.sizes), grad_weight_EOI
        )
        for rows_I, weight_OI, grad_O, grad_rows_I, grad_weight_OI in parts:
            if len(rows_I):
                torch.mm(grad_O, weight_OI, out=grad_rows_I)
                torch.mm(grad_O.t(), rows_I, out=grad_weight_OI)
        return grad_rows_NI, grad_weight_EOI, None
