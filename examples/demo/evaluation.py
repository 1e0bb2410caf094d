"""What each validation set costs and where its tokens go: the loss, and the tokens per expert of every MoE layer.

Everything is measured inside Megatron's own evaluation, on every validation set of `--multiple-validation-sets`:

- the loss, as the sum over tokens divided by their number, over all data-parallel ranks;
- the tokens per expert, from the routing map that each router hands to its dispatcher. A forward hook on the router
  sees it; training is not looked at. `close_set` is Megatron's `non_loss_data_func`, called after each validation set.

The counts are integers summed in float64, so they are exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


class ValidationReport:
    """Collects over one validation set at a time; inactive (and free of cost) until `enable` got a file name."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.names: list[str] = []
        self.evaluations: list[dict[str, Any]] = []
        self._watched: torch.nn.Module | None = None
        self._loss = torch.zeros(2, dtype=torch.float64)  # sum over tokens, number of tokens
        self._tokens_per_expert: dict[int, torch.Tensor] = {}  # by layer number

    def enable(self, path: str | None, names: list[str] | None) -> None:
        """Turns the report on; `names` are those of `--validation-set-names`."""
        if path is None:
            return
        if not names:
            raise SystemExit("--validation-report needs --multiple-validation-sets and --validation-set-names")
        self.path, self.names = Path(path), names

    def watch(self, model: torch.nn.Module) -> None:
        """Hooks the routers of the model, once."""
        if self.path is None or self._watched is model:
            return
        from megatron.core.transformer.moe.router import TopKRouter

        self._watched = model
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: Any, _inputs: Any, outputs: Any) -> None:
        if router.training:
            return
        _, routing_map = outputs
        counts = routing_map.detach().sum(dim=0).double().cpu()
        layer = router.layer_number
        self._tokens_per_expert[layer] = self._tokens_per_expert.get(layer, torch.zeros_like(counts)) + counts

    def add_loss(self, loss: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Called with every micro-batch's sums; training's are left out (they have a gradient graph)."""
        if self.path is not None and not torch.is_grad_enabled():
            self._loss += torch.stack([loss.detach().double().cpu(), num_tokens.double().cpu()])

    def close_set(self, _model: Any) -> None:
        """Megatron has finished one validation set: sum over the data-parallel ranks and store."""
        from megatron.training import get_args

        args = get_args()
        layers = sorted(self._tokens_per_expert)
        flat = torch.cat([self._loss] + [self._tokens_per_expert[layer] for layer in layers]).cuda()
        torch.distributed.all_reduce(flat, group=_data_parallel_group())
        loss_sum, num_tokens = flat[:2].tolist()
        counts = flat[2:].view(len(layers), -1).long().tolist()
        self.evaluations.append(
            {
                "iteration": args.consumed_train_samples // args.global_batch_size,
                "name": self.names[len(self.evaluations) % len(self.names)],
                "loss": loss_sum / num_tokens,
                "tokens": int(num_tokens),
                "layers": layers,
                "tokens_per_expert": counts,
            }
        )
        self._loss.zero_()
        self._tokens_per_expert.clear()

    def write(self) -> None:
        """Rank 0 writes what was measured, in the order of the evaluations."""
        if self.path is not None and torch.distributed.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.evaluations) + "\n", encoding="utf-8")


def _data_parallel_group() -> torch.distributed.ProcessGroup:
    from megatron.core import mpu

    if mpu.get_tensor_model_parallel_world_size() > 1 or mpu.get_pipeline_model_parallel_world_size() > 1:
        raise SystemExit("--validation-report measures data and expert parallelism; use TP 1 and PP 1 with it")
    return mpu.get_data_parallel_group(with_context_parallel=True)
