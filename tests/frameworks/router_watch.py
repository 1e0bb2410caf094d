"""What the routers of a model did in an optimizer step, counted without the plugin, and the loss that follows from it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class RouterWatch:
    """Counts the selections of every router's forward in training, and keeps what the last layer's loss depends on."""

    def __init__(self, model) -> None:
        """Args: model: in Megatron's DDP, which is what holds the gradients."""
        self._model = model
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._forget()
        for layer, router in enumerate(self._routers):
            router.register_forward_hook(self._hook(layer))

    def _forget(self) -> None:
        self._forwards: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._routers]

    def _hook(self, layer: int):
        def keep(router, inputs, outputs) -> None:
            if router.training and torch.is_grad_enabled():
                hidden_TH = inputs[0].detach().double().flatten(0, 1)
                self._forwards[layer].append((hidden_TH, outputs[1].sum(dim=0)))

        return keep

    def step(self) -> dict:
        """Call it between the last backward and the optimizer.

        Returns:
            micro_batches, tokens: of the step on all ranks.
            loss: E sum_i f_i p_i over the whole step, mean over layers.
            gradient: [E, H] the gradient of the last router's weight that Megatron left.
            global_gradient, micro_gradient: [E, H] float64, of E sum_i f_i p_i for that router: f over all ranks and the
                micro-batches so far; f over the micro-batch alone.
        """
        losses = [self._whole_step(layer) for layer in range(len(self._routers))]
        forwards = self._forwards[-1]
        found = {
            "micro_batches": len(forwards) * dist.get_world_size(),
            "tokens": int(_sum(torch.tensor(sum(len(hidden) for hidden, _ in forwards)))),
            "loss": sum(losses) / len(losses),
            "gradient": self._main_gradient(self._routers[-1].weight),
            "global_gradient": self._expected_gradient(everywhere=True),
            "micro_gradient": self._expected_gradient(everywhere=False),
        }
        self._forget()
        return found

    def _whole_step(self, layer: int) -> float:
        weight_EH = self._routers[layer].weight.detach().double()
        hidden_TH = torch.cat([hidden for hidden, _ in self._forwards[layer]])
        counts_E = _sum(sum(counts for _, counts in self._forwards[layer]))
        scores_E = _sum(torch.softmax(hidden_TH @ weight_EH.T, dim=-1).sum(dim=0))
        return float(len(counts_E) * (counts_E / counts_E.sum() * scores_E / scores_E.sum()).sum())

    def _main_gradient(self, weight) -> Tensor:
        """Put together from the ranks, each of which has reduced its share for the distributed optimizer."""
        (buffer,) = (buffer for buffer in self._model.buffers if weight in buffer.param_index_map)
        start, end, number = buffer.param_index_map[weight]
        bucket, size = buffer.buckets[number], dist.get_world_size()
        shares = [torch.empty(bucket.grad_data.numel() // size) for _ in range(size)]
        dist.all_gather(shares, bucket.grad_data.view(size, -1)[dist.get_rank()])
        return torch.cat(shares)[start - bucket.offset : end - bucket.offset].view(weight.shape).double()

    def _expected_gradient(self, everywhere: bool) -> Tensor:
        """Of the mean over micro-batches (and ranks, which Megatron's DDP averages over)."""
        weight_EH = self._routers[-1].weight.detach().double().requires_grad_()
        forwards = self._forwards[-1]
        so_far_E, loss = 0, torch.zeros((), dtype=torch.float64)
        for hidden_TH, counts_E in forwards:
            so_far_E = so_far_E + _sum(counts_E) if everywhere else counts_E
            tokens = _sum(torch.tensor(len(hidden_TH))) if everywhere else len(hidden_TH) * dist.get_world_size()
            scores_E = torch.softmax(hidden_TH @ weight_EH.T, dim=-1).sum(dim=0)
            loss = loss + len(counts_E) * (so_far_E / so_far_E.sum() * scores_E / tokens).sum() / len(forwards)
        loss.backward()
        return _sum(weight_EH.grad)


def _sum(number: Tensor) -> Tensor:
    """Over all ranks."""
    total = number.clone()
    dist.all_reduce(total)
    return total
