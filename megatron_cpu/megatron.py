"""What in Megatron itself assumes the libraries of a GPU machine. Each function here is one such place."""

from __future__ import annotations

import copy
import importlib.util
import logging
from typing import Any

import torch


def install() -> None:
    """Put the stand-ins into the installed Megatron-Core."""
    _router_without_transformer_engine()
    _norm_with_sequence_parallel()
    _attention_with_two_widths()
    _resume_with_torch_adam()
    _keep_built_dataset_helper()
    _one_generator()


def _router_without_transformer_engine() -> None:
    """Until 0.16 the router asks whether `te_general_gemm` is None, a name it only has with Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _norm_with_sequence_parallel() -> None:
    """Torch's norm with sequence parallelism.

    Megatron's `WrappedTorchNorm` refuses it: unlike the norms of Apex and Transformer Engine, it does not mark its
    parameters, so their gradients would not be summed over the tensor-parallel ranks. Here they are marked.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    def build_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = build(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_marked  # type: ignore[method-assign]


def _attention_with_two_widths() -> None:
    """Multi-latent attention in Megatron's own `DotProductAttention`.

    MLA (DeepSeek) has keys and values of different widths and passes both on; only Transformer Engine's attention takes
    them. The computation reads the widths from the tensors, so the width of the output is all that has to be told.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    init = DotProductAttention.__init__

    def init_with_widths(
        self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        init(self, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels

    DotProductAttention.__init__ = init_with_widths  # type: ignore[method-assign]


def _resume_with_torch_adam() -> None:
    """Loading a distributed optimizer's checkpoint with Torch's Adam.

    Adam of Apex and Transformer Engine counts its steps per group, Torch's in a tensor per parameter. Megatron's distributed
    optimizer saves the number with the groups. On loading (0.14 to 0.19) it asks a fresh optimizer for it, expects it in the
    parameter states or copies the fresh one from there, and gives all parameters one tensor, which each then increments.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def has_torch_adam(self: Any) -> bool:
        return isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))

    def state_dict_of_fresh_adam(self: Any) -> Any:
        if has_torch_adam(self):
            state = self.optimizer.state
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                if parameter not in state:
                    averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    state[parameter] = {"step": torch.tensor(0.0), **averages}
        return state_dict(self)

    def set_states_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if has_torch_adam(self):
            group, index = self.model_param_group_index_map[model_param]
            own = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
            tensors = {**tensors, "step": own["step"]}
        set_states(self, model_param, tensors)

    def load_state_dict_with_own_steps(self: Any, loaded: Any) -> None:
        load_state_dict(self, loaded)
        if has_torch_adam(self):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    DistributedOptimizer.state_dict = state_dict_of_fresh_adam
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_step
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps


def _keep_built_dataset_helper() -> None:
    """Megatron calls `make` for its dataset helper at every start; the wheels carry it built, without a Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return  # a source tree in which it was not built yet: Megatron's own way
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def _one_generator() -> None:
    """Megatron warns when the CPU generator moves while the CUDA one is forked. Here they are one: it always does."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
