"""Records Megatron's evaluation, domain after domain, summed over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.core.collective import Reduction, gather_objects, gather_rows
from megatron_global_lbl.hook import evaluation
from megatron_global_lbl.hook.evaluation import Domain
from megatron_global_lbl.hook.experts import MoeLayer
from megatron_global_lbl.specialise import similarity
from megatron_global_lbl.specialise.result import LayerExperts, MeasuredDomain, Specialisation, spread


class Measurement:
    """An `evaluation.Observer`; after `finish`, `result` is there on rank 0."""

    def __init__(self, sampled_tokens: int) -> None:
        """`sampled_tokens`: per domain and layer, over all ranks and forwards; every expert runs on each of them."""
        self._sampled_tokens = sampled_tokens
        self.result: Specialisation | None = None
        self.finished = False
        self._domains: list[tuple[Domain, int, dict[str, float]]] = []
        self._routers: dict[str, Any] = {}
        self._layers: dict[str, MoeLayer] = {}
        self._sums: dict[str, Tensor] = {}  # by layer: selections per expert, sum of the selected scores, tokens
        self._routed: list[dict[str, list[float]]] = []  # per domain and layer, over the stage's ranks
        self._outputs: dict[str, Tensor] = {}  # by layer: [E, E] sum of cosines
        self._norms: dict[str, Tensor] = {}  # by layer: [E] sum of relative norms by rank, and the sum of correlations
        self._sampled: dict[str, int] = {}

    def begin(self, domain: Domain, forwards: int) -> None:
        self._sums.clear()
        self._domain, self._forwards = domain, forwards

    def route(self, router: Any, *, scores: Tensor, selection: Tensor, padding_mask: Tensor | None) -> None:
        if padding_mask is not None:
            selection = selection & ~padding_mask.unsqueeze(1)
        counts_E = selection.sum(dim=0).double()
        score_sum = (scores * selection).sum(dtype=torch.float64).view(1)
        tokens = selection.any(dim=1).sum().double().view(1)
        key, _, _ = evaluation.describe(router)
        self._routers[key] = router
        sums = torch.cat([counts_E, score_sum, tokens])
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def enter(self, layer: MoeLayer, hidden: Tensor, padding_mask: Tensor | None) -> None:
        """Run every expert on a few tokens of each micro-batch."""
        self._layers[layer.key] = layer
        if layer.no_outputs is not None:
            return
        stage = _stage(layer.router)
        number = max(1, self._sampled_tokens // (stage.size() * self._forwards))
        tokens_TH = _some_rows(hidden, padding_mask, number)
        # The router's own function, as in its forward: [T, 1, H] is a sequence of one.
        scores_TE = evaluation.scores_of(layer.router, layer.router.gating(tokens_TH.unsqueeze(1)).squeeze(1)).float()
        for group in (layer.expert_parallel, layer.expert_tensor):
            tokens_TH, scores_TE = gather_rows(tokens_TH, group), gather_rows(scores_TE, group)
        outputs_eTH = Reduction(layer.outputs(tokens_TH).float(), layer.expert_tensor).wait()
        products_TEE = similarity.output_products(outputs_eTH, layer.expert_parallel)
        norms_TE = similarity.norms_of(products_TEE)
        by_rank_E = similarity.relative_norms_by_rank(norms_TE, scores_TE).double().sum(dim=0)
        correlation = similarity.rank_correlations(norms_TE, scores_TE).sum().view(1)
        for sums, value in (
            (self._outputs, similarity.cosines(products_TEE).double().sum(dim=0)),
            (self._norms, torch.cat([by_rank_E, correlation])),
        ):
            sums[layer.key] = sums[layer.key] + value if layer.key in sums else value
        self._sampled[layer.key] = self._sampled.get(layer.key, 0) + len(scores_TE)

    def end(self, loss: dict[str, float], sequences: int) -> None:
        routed = {}
        for key, sums in self._sums.items():
            routed[key] = Reduction(sums, _stage(self._routers[key])).wait().tolist()
        self._routed.append(routed)
        self._domains.append((self._domain, sequences, loss))

    def finish(self, iteration: int) -> None:
        self.finished = True
        mine = {
            key: {
                "routed": [routed[key] for routed in self._routed],
                "experts": self._experts(key, self._layers[key]),
                "shape": evaluation.describe(router)[1:],
            }
            for key, router in self._routers.items()
        }
        leads = [dist.get_rank() == min(dist.get_process_group_ranks(_stage(router))) for router in self._routers.values()]
        losses = [loss for _, _, loss in self._domains]
        everything = gather_objects((mine if all(leads) else {}, losses), _world())
        if dist.get_rank() == 0:
            layers = {key: layer for found, _ in everything for key, layer in found.items()}
            losses = next((found for _, found in everything if all(found)), losses)
            self.result = self._merge(layers, losses, iteration)

    def _experts(self, key: str, layer: MoeLayer) -> LayerExperts:
        """What is said of one layer's experts; on every rank of its stage."""
        gate = layer.router.weight.detach().float()
        matrices = layer.weights()
        weights = None
        if matrices is not None:
            products = similarity.weight_products(matrices, layer.expert_parallel, layer.expert_tensor)
            weights = spread(similarity.cosines(products).tolist())
        outputs = norms = correlation = None
        sampled = 0
        if key in self._outputs:
            # Every rank of an expert-parallel group has the sums of the whole group; the quotients are the stage's.
            packed = torch.cat(
                [self._outputs[key].flatten(), self._norms[key], torch.full_like(self._norms[key][:1], self._sampled[key])]
            )
            stage = _stage(layer.router)
            packed = Reduction(packed, stage).wait()
            sampled = int(packed[-1].item()) // (layer.expert_parallel.size() * layer.expert_tensor.size())
            packed = packed[:-1] / packed[-1]
            experts = len(gate)
            outputs = spread(packed[: experts * experts].view(experts, experts).tolist())
            norms = packed[experts * experts : -1].tolist()
            correlation = packed[-1].item()
        return LayerExperts(
            gates=spread(similarity.cosines(gate @ gate.T).tolist()),
            weights=weights,
            outputs=outputs,
            norm_by_score_rank=norms,
            norm_score_correlation=correlation,
            sampled_tokens=sampled,
            not_measured=[
                reason
                for reason in (layer.no_outputs, f"the weights of {layer.kind} are not known" if weights is None else None)
                if reason
            ],
        )

    def _merge(self, layers: dict[str, Any], losses: list[dict[str, float]], iteration: int) -> Specialisation:
        keys = sorted(layers, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key))
        num_experts, topk = layers[keys[0]]["shape"]
        routed = [[layers[key]["routed"][d] for key in keys] for d in range(len(self._domains))]
        return Specialisation(
            iteration=iteration,
            num_experts=num_experts,
            topk=topk,
            layers=keys,
            domains=[
                MeasuredDomain(domain.name, list(domain.data), sequences, round(routed[d][0][-1]), losses[d])
                for d, (domain, sequences, _) in enumerate(self._domains)
            ],
            tokens_per_expert=[[[round(count) for count in sums[:-2]] for sums in domain] for domain in routed],
            score_sums=[[sums[-2] / max(sums[-1], 1) for sums in domain] for domain in routed],
            experts=[layers[key]["experts"] for key in keys],
        )


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _stage(router: Any) -> dist.ProcessGroup:
    return evaluation.process_groups(router)[0]


def _some_rows(rows: Tensor, padding_mask: Tensor | None, number: int) -> Tensor:
    """`number` valid rows at even distances; some of them twice where there are fewer."""
    valid = torch.arange(len(rows), device=rows.device)
    if padding_mask is not None and not bool(padding_mask.all()):
        valid = valid[~padding_mask]
    chosen = torch.linspace(0, len(valid) - 1, number, device=rows.device).round().long()
    return rows[valid[chosen]]
