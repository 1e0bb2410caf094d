"""A worker's part of test_specialised_layer.py: a real MoE layer under `Measurement`, and everything that the formulas need."""

from __future__ import annotations

import torch
import torch.distributed as dist
from harness import _config_fields, initialize
from layout import Layout
from truth import Problem

DOMAINS = ("code", "prose")


def measure(problem: Problem, layout: Layout, tokens: int):
    """What rank 0 measured in two domains of one micro-batch, and on every rank the tokens, and the weights it has."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig
    from toy import _moe_layer

    from megatron_global_lbl.hook import evaluation
    from megatron_global_lbl.hook.experts import MoeLayer
    from megatron_global_lbl.hook.patching import Patches
    from megatron_global_lbl.specialise.measurement import Measurement

    initialize(layout)
    config = TransformerConfig(**_config_fields(problem, layout, {}))
    layer = _moe_layer(config, 3, False).cuda().eval()
    torch.manual_seed(
        100 + parallel_state.get_expert_model_parallel_rank() * 10 + parallel_state.get_expert_tensor_parallel_rank()
    )
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(1)
    layer.router.weight.data.normal_()

    torch.manual_seed(1000 + dist.get_rank())
    hidden = torch.randn(len(DOMAINS), tokens, 1, problem.hidden)
    padding = torch.zeros(len(DOMAINS), 1, tokens, dtype=torch.bool)
    padding[0, 0, : tokens // 4] = True
    measurement = Measurement(sampled_tokens=tokens * dist.get_world_size())
    patches = Patches()
    domains = [evaluation.Domain(name, (name,)) for name in DOMAINS]
    evaluation.install_observers(patches, measurement)
    try:
        with torch.no_grad():
            for d, domain in enumerate(domains):
                measurement.begin(domain, forwards=1)
                layer(hidden[d], padding_mask=padding[d])
                measurement.end({"lm loss": float(d)}, sequences=1)
            measurement.finish(iteration=5)
    finally:
        patches.restore()
    place = (parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank())
    weights = [(e.linear_fc1.weight.detach(), e.linear_fc2.weight.detach()) for e in layer.experts.local_experts]
    assert MoeLayer(layer).no_outputs is None
    return measurement.result, hidden.squeeze(2), padding.squeeze(1), layer.router.weight.detach(), place, weights
