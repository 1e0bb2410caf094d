"""What a run leaves: loss and load of every step, and an evaluation of the trained model on the held-out text of every domain.

Everything is read from forward hooks on Megatron's routers and from the loss function, so it is the same for every balance
loss, also for those that are none. Counts are exact; they are summed over data-parallel ranks once, after the training.

Shape suffixes: S steps, L layers, E experts, D domains, B sequences, T tokens of a sequence.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from reproduce.data import index_of
from torch import Tensor

EVALUATED_AT_ONCE = 32  # sequences


class Measurement:
    """Collects while Megatron trains."""

    def __init__(self) -> None:
        self._model: torch.nn.Module | None = None
        self._routers: list[Any] = []
        self._iteration = -1
        self._first_iteration = 0
        self._counts: list[Tensor] = []  # per step [L, E]
        self._losses: list[Tensor] = []  # per step [2]: sum of token losses, tokens

    def watch(self, model: torch.nn.Module, iteration: int) -> None:
        """Called in every forward step, with Megatron's 0-based iteration."""
        if self._model is None:
            from megatron.core.transformer.moe.router import TopKRouter

            self._model, self._first_iteration = model, iteration
            self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
            for number, router in enumerate(self._routers):
                router.register_forward_hook(lambda router, _, out, number=number: self._count(number, router, out[1]))
        if iteration != self._iteration:
            self._iteration = iteration
            experts = self._routers[0].config.num_moe_experts
            device = self._routers[0].weight.device
            self._counts.append(torch.zeros(len(self._routers), experts, dtype=torch.int64, device=device))
            self._losses.append(torch.zeros(2, dtype=torch.float64, device=device))

    def _count(self, number: int, router: Any, routing_map: Tensor) -> None:
        if router.training:
            self._counts[-1][number] += routing_map.sum(dim=0)

    def add_loss(self, loss: Tensor, num_tokens: Tensor) -> None:
        """A micro-batch's sum over tokens, and their number."""
        self._losses[-1] += torch.stack([loss.double(), num_tokens.double()])

    def write(self, path: Path, data: Path) -> None:
        """Reduce, evaluate, and write on rank 0."""
        from megatron.core import mpu

        counts_SLE, losses_S2 = torch.stack(self._counts), torch.stack(self._losses)
        for tensor in (counts_SLE, losses_S2):
            torch.distributed.all_reduce(tensor, group=mpu.get_data_parallel_group(with_context_parallel=True))
        if torch.distributed.get_rank() == 0:
            loss_S = (losses_S2[:, 0] / losses_S2[:, 1]).cpu().numpy()
            found = {
                "first_iteration": self._first_iteration,
                "train_loss": _blocks(loss_S),
                **balance(counts_SLE.cpu().numpy()),
            }
            found.update(self._evaluate(data))
            if not self._first_iteration:  # else another process trained the beginning
                found["processor_seconds"] = round(time.process_time(), 1)  # what other work of the machine does not change
            path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        torch.distributed.barrier()

    @torch.no_grad()
    def _evaluate(self, data: Path) -> dict[str, Any]:
        """Loss, expert frequencies and balance of the trained model on the held-out text, domain by domain."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        assert self._model is not None
        model, routers = self._model, self._routers
        model.eval()
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in routers]
        hooks = [
            router.register_forward_hook(lambda router, ins, out, seen=seen[i]: seen.append((_scores(router, ins[0]), out[1])))
            for i, router in enumerate(routers)
        ]
        index = index_of(data)
        length, device = index["sequence_length"], routers[0].weight.device
        position_T = torch.arange(length, device=device)
        losses, loads, scores_of, micro, uneven = {}, [], [], [], []
        for domain in index["domains"]:
            held_out = IndexedDataset(str(data / f"{domain['stem']}_valid"))  # what it gives are views of its open file
            tokens = torch.from_numpy(numpy.concatenate([held_out[i] for i in range(len(held_out))]).astype("int64"))
            sequences = (len(tokens) - 1) // length
            inputs_BT = tokens[: sequences * length].view(-1, length).to(device)
            labels_BT = tokens[1 : sequences * length + 1].view(-1, length).to(device)
            total = 0.0
            for inputs, labels in zip(inputs_BT.split(EVALUATED_AT_ONCE), labels_BT.split(EVALUATED_AT_ONCE)):
                total += model(inputs, position_T.expand_as(inputs), None, labels=labels).double().sum().item()
            losses[domain["name"]] = total / labels_BT.numel()
            load_LE, micro_L, uneven_L = [], [], []
            for of_layer in seen:
                # Megatron's layers see [T, B]; the router's tokens are T x B.
                maps_TBE = torch.cat([m.view(length, -1, m.shape[-1]) for _, m in of_layer], dim=1).double()
                scores_TBE = torch.cat([s.view(length, -1, s.shape[-1]) for s, _ in of_layer], dim=1).double()
                load_LE.append(maps_TBE.sum((0, 1)))
                f_BE, p_BE = maps_TBE.mean(0), scores_TBE.mean(0)
                relative_BE = maps_TBE.shape[-1] * f_BE / f_BE.sum(-1, keepdim=True)
                micro_L.append((relative_BE * p_BE).sum(-1).mean())
                uneven_L.append(relative_BE.amax(-1).mean() - 1)
                scores_of.append((scores_TBE * maps_TBE).sum(-1).mean().item())
                of_layer.clear()
            loads.append(torch.stack(load_LE))
            micro.append(torch.stack(micro_L))
            uneven.append(torch.stack(uneven_L))
        for hook in hooks:
            hook.remove()
        loads_DLE = torch.stack(loads)
        shares_DLE = loads_DLE / loads_DLE.sum(-1, keepdim=True)
        mean_LE = shares_DLE.mean(0)
        topk = scores_of
        layers = len(routers)
        return {
            "valid_loss": {name: round(loss, 5) for name, loss in losses.items()},
            "frequencies": [[[round(x, 4) for x in layer] for layer in domain] for domain in shares_DLE.tolist()],
            "specialisation": shares_DLE.amax(-1).mean().item(),
            "contrast": (shares_DLE - mean_LE).abs().sum(-1).mean().item() / 2,
            "top_scores": [sum(topk[layer::layers]) / len(topk[layer::layers]) for layer in range(layers)],
            "lbl_within_sequences": torch.stack(micro).mean().item(),
            "max_vio_within_sequences": torch.stack(uneven).mean().item(),
            "max_vio_valid": (mean_LE.amax(-1) * mean_LE.shape[-1] - 1).mean().item(),
        }


def _scores(router: Any, hidden: Tensor) -> Tensor:
    """The scores of the auxiliary loss: softmax, or the sigmoid normalised over the experts."""
    logits = router.gating(hidden).view(-1, router.config.num_moe_experts).float()
    if router.config.moe_router_score_function == "sigmoid":
        scores = torch.sigmoid(logits)
        return scores / scores.sum(-1, keepdim=True)
    return torch.softmax(logits, dim=-1)


def balance(counts_SLE: numpy.ndarray) -> dict[str, Any]:
    """The load over the steps: MaxVio (max / mean - 1 over the global batch, mean over layers)."""
    loads = counts_SLE / counts_SLE.mean(-1, keepdims=True)
    max_vio_S = loads.max(-1).mean(-1) - 1
    tail = counts_SLE[-max(1, len(counts_SLE) // 20) :].sum(0)
    return {
        "steps": len(counts_SLE),
        "max_vio_first": [round(float(x), 3) for x in max_vio_S[:160]],
        "max_vio": _blocks(max_vio_S),
        "starved_experts": float((tail < 0.1 * tail.mean(-1, keepdims=True)).mean()),
    }


def _blocks(values_S: numpy.ndarray, size: int = 10) -> list[float]:
    """Means over blocks of steps."""
    return [round(float(values_S[at : at + size].mean()), 4) for at in range(0, len(values_S), size)]
