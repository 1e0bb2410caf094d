"""The flags that only work on a GPU: what CPU mode puts in their place, and why. One line on rank 0 per change.

The change is made where Megatron's parser returns, so before Megatron validates; its checks see the arguments that run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from typing import Any, NamedTuple

CUDA_KERNEL = "its kernel exists for CUDA only"
TE = "Transformer Engine needs a GPU"
WITHOUT_FP8 = "it goes with FP8"


class Rule(NamedTuple):
    """`dest` becomes `value` unless it is one of `fine` already. A function makes the value from the one that was given."""

    dest: str
    value: Any
    why: str
    fine: tuple[Any, ...] = ()


def _with_kept_output(modules: list[str] | None) -> list[str] | None:
    # An empty list is Megatron's default, which is spelled None.
    return [module for module in modules or () if module not in ("layernorm", "mla_up_proj", "moe_act")] or None


RULES = (
    Rule("distributed_backend", "gloo", "NCCL needs a GPU"),
    Rule("high_priority_stream_groups", [], "an option of NCCL"),
    Rule("nccl_communicator_config_path", None, "an option of NCCL"),
    Rule("nccl_ub", False, "an option of NCCL"),
    Rule("pipeline_model_parallel_comm_backend", None, "gloo is the only backend"),
    Rule("use_sharp", False, "an option of NCCL"),
    Rule("gradient_reduce_div_fusion", False, "an option of NCCL"),
    Rule("sharp_enabled_group", None, "an option of NCCL"),
    Rule("use_ring_exchange_p2p", False, CUDA_KERNEL),
    Rule("transformer_impl", "local", TE),
    Rule("fp8", None, TE),
    Rule("fp4", None, TE),
    Rule("fp8_param_gather", False, TE),
    Rule("fp4_param_gather", False, TE),
    Rule("reuse_grad_buf_for_mxfp8_param_ag", False, WITHOUT_FP8),
    Rule("moe_router_padding_for_fp8", False, WITHOUT_FP8),
    Rule("moe_router_padding_for_quantization", False, WITHOUT_FP8),
    Rule("tp_comm_overlap", False, TE),
    Rule("delay_wgrad_compute", False, TE),
    Rule("overlap_dispatch_backward_with_experts_wgrad", False, TE),
    Rule("fine_grained_activation_offloading", False, TE),
    Rule("overlap_moe_expert_parallel_comm", False, TE),
    Rule("use_transformer_engine_op_fuser", False, TE),
    Rule("use_te_activation_func", False, TE),
    Rule("te_rng_tracker", False, TE),
    Rule("fused_residual_rmsnorm", False, TE),
    Rule("use_grouped_gemm_for_dense_mlp", False, TE),
    Rule("use_grouped_gemm_for_shared_expert", False, TE),
    Rule("moe_single_grouped_weight", False, TE),
    Rule("moe_single_grouped_bias", False, TE),
    Rule("use_precision_aware_optimizer", False, TE),
    Rule("optimizer_cpu_offload", False, "it needs the precision-aware optimizer"),
    Rule("main_params_dtype", "fp32", "it needs the precision-aware optimizer"),
    Rule("exp_avg_dtype", "fp32", "it needs the precision-aware optimizer"),
    Rule("exp_avg_sq_dtype", "fp32", "it needs the precision-aware optimizer"),
    Rule("cpu_offloading_num_layers", 0, TE),
    Rule("cross_entropy_fusion_impl", "native", TE),
    Rule("moe_router_fusion", False, TE),
    Rule("moe_permute_fusion", False, TE),
    Rule("apply_rope_fusion", False, TE),
    Rule("gradient_accumulation_fusion", False, CUDA_KERNEL),
    Rule("defer_embedding_wgrad_compute", False, "it needs gradient accumulation fusion"),
    Rule("masked_softmax_fusion", False, CUDA_KERNEL),
    Rule("no_persist_layer_norm", True, CUDA_KERNEL),
    Rule("memory_efficient_layer_norm", False, CUDA_KERNEL),
    Rule("moe_grouped_gemm", False, CUDA_KERNEL),
    Rule("recompute_modules", _with_kept_output, "those left out are recomputed with Transformer Engine only"),
    Rule("batch_invariant_mode", False, CUDA_KERNEL),
    Rule("use_flash_attn", False, CUDA_KERNEL),
    Rule("attention_backend", "unfused", CUDA_KERNEL, fine=("auto", "local")),
    Rule("layernorm_zero_centered_gamma", False, "Torch's norm stores its weight around 1; the function is the same"),
    Rule("apply_layernorm_1p", False, "Torch's norm stores its weight around 1; the function is the same"),
    Rule("moe_permute_fusion_into_hybridep", False, CUDA_KERNEL),
    Rule("moe_enable_deepep", False, CUDA_KERNEL),
    Rule("moe_token_dispatcher_type", "alltoall", "DeepEP and HybridEP need GPUs", fine=("allgather",)),
    Rule("cuda_graph_impl", "none", "there are no CUDA graphs"),
    Rule("enable_cuda_graph", False, "there are no CUDA graphs"),
    Rule("external_cuda_graph", False, "there are no CUDA graphs"),
    Rule("optimizer_cuda_graph", False, "there are no CUDA graphs"),
    Rule("moe_paged_stash", False, "there are no CUDA graphs"),
    Rule("gpu_sniff_test_interval", None, "it tests GPUs"),
    Rule("async_save", False, "the worker process would not have the stand-in for torch.cuda"),
    Rule("profile", False, "it starts the CUDA profiler"),
    Rule("record_memory_history", False, "there is no CUDA memory"),
    Rule("num_workers", 0, "a worker process would not have the stand-in for torch.cuda"),
)


_told: set[str] = set()


def install() -> None:
    """Let Megatron's own parser return arguments that can run on a CPU."""
    # Before 0.17 the wheels carry megatron.core only; then there is no parser, and whoever builds the configs decides.
    if importlib.util.find_spec("megatron.training") is None:
        return
    from megatron.training import arguments

    add_megatron_arguments = arguments.add_megatron_arguments

    def add_arguments_for_cpu(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_megatron_arguments(parser)
        parse_known_args = parser.parse_known_args  # parse_args() calls it, too

        def parse_for_cpu(*args: Any, **kwargs: Any) -> Any:
            namespace, rest = parse_known_args(*args, **kwargs)
            change(namespace, parser)
            return namespace, rest

        parser.parse_known_args = parse_for_cpu  # type: ignore[method-assign, assignment]
        return parser

    arguments.add_megatron_arguments = add_arguments_for_cpu


def change(namespace: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Apply the rules to what was parsed. A flag that this Megatron version does not have is left out."""
    actions = {action.dest: action for action in parser._actions}
    for rule in RULES:
        if not hasattr(namespace, rule.dest):
            continue
        old = getattr(namespace, rule.dest)
        name = getattr(old, "name", old)  # --attention-backend is an enum: compared and shown by its name
        value = rule.value(old) if callable(rule.value) else rule.value
        if name == value or name in rule.fine or (not name and not value):
            continue
        setattr(namespace, rule.dest, value if name is old else type(old)[value])
        _tell(f"--cpu: {_as_typed(rule.dest, actions.get(rule.dest), name, value)}: {rule.why}")


def _as_typed(dest: str, action: argparse.Action | None, old: Any, new: Any) -> str:
    """The change in the words of the command line: `--flag old -> new`, `--flag removed`, `--no-flag added`."""
    flag = action.option_strings[0] if action is not None else "--" + dest.replace("_", "-")
    if action is not None and action.nargs == 0 and isinstance(new, bool):
        return f"{flag} {'added' if action.const == new else 'removed'}"
    return f"{flag} {_words(old)} -> {_words(new)}"


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return "(none)" if value is None else str(value)


def _tell(line: str) -> None:
    if line not in _told and int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)
    _told.add(line)
