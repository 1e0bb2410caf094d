"""`--moe-lbl-metrics-dir`: one line of JSON per optimizer step with the balance of every MoE layer, for any scope.

File `balance.pp<stage>.jsonl`, one per pipeline stage, written by the stage's first rank. The first line, and the first one
after every restart, is a header {"format", "scope", "num_experts", "topk", "layers"}; every other line a step:

    iteration          1-based, as Megatron logs it; after a resume the later line of an iteration counts
    tokens             valid tokens of the global batch
    tokens_per_expert  [L][E] selections over the global batch, exact
    lbl_global         [L] E * sum_i f_i p_i with f and p over the global batch; 1.0 is perfect balance
    lbl_micro          [L] mean over micro-batches and data-parallel ranks of the LBL within each
    max_vio            [L] max load / mean load - 1 over the global batch

It costs two packed reductions per step and one copy to the host on the writing rank.
Shape suffixes: L layers, M micro-batches, E experts; S = 2 E + 1 (selections, summed scores, valid tokens).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.collective import Reduction
from megatron_global_lbl.facts import RouterFacts
from megatron_global_lbl.settings import Settings

FORMAT = 1


class BalanceRecord:
    """Observes router forwards and writes one line per step."""

    def __init__(self, settings: Settings) -> None:
        assert settings.metrics_dir is not None
        self._directory = Path(settings.metrics_dir)
        self._scope = settings.scope.value
        self._observed: dict[str, list[Tensor]] = {}
        self._facts: RouterFacts | None = None
        self._path: Path | None = None

    def observe(self, facts: RouterFacts, *, scores: Tensor, selection: Tensor, padding_mask: Tensor | None) -> None:
        """Take the sums of one micro-batch of one layer; shapes as in `Engine.route`."""
        with torch.no_grad():
            tokens = torch.full((), selection.shape[0], dtype=torch.float64, device=scores.device)
            if padding_mask is not None:
                selection = selection & ~padding_mask.unsqueeze(1)
                tokens = (~padding_mask).sum().double()
            # float64 holds integers up to 2^53 exactly, so the counts survive being packed with the scores.
            sums_S = torch.cat([selection.sum(dim=0).double(), scores.detach().double().sum(dim=0), tokens.view(1)])
        self._facts = facts
        self._observed.setdefault(facts.key, []).append(sums_S)

    def reset(self) -> None:
        """Forget the step."""
        self._observed.clear()

    def write(self, iteration: int) -> None:
        """Reduce the step over the stage's ranks and append its line; `iteration` is 1-based.

        Raises:
            OSError: the directory cannot be written.
        """
        facts, observed = self._facts, dict(self._observed)
        self.reset()
        if facts is None or not observed:
            return
        sums_LMS = torch.stack([torch.stack(layer) for layer in observed.values()])
        num_experts = (sums_LMS.shape[-1] - 1) // 2
        Reduction(sums_LMS, facts.model, blocking=True)
        selections_LME, scores_LME, tokens_LM1 = sums_LMS.split([num_experts, num_experts, 1], dim=-1)
        lbl_micro_L1 = _lbl(selections_LME, scores_LME, tokens_LM1).mean(dim=1, keepdim=True)
        valid_ranks = torch.ones_like(lbl_micro_L1)
        step_LS = torch.cat([sums_LMS.sum(dim=1), lbl_micro_L1, valid_ranks], dim=1)
        Reduction(step_LS, facts.stage, blocking=True)
        # Every rank of a TP x CP group brought the group's sums.
        step_LS /= facts.model.size()
        if dist.get_rank() != min(dist.get_process_group_ranks(facts.stage)):
            return
        selections_LE, scores_LE, rest_L3 = step_LS.cpu().split([num_experts, num_experts, 3], dim=1)
        tokens_L1, lbl_micro_L1, ranks_L1 = rest_L3.split(1, dim=1)
        line = {
            "iteration": iteration,
            "tokens": int(tokens_L1[0].item()),
            "tokens_per_expert": selections_LE.round().long().tolist(),
            "lbl_global": _lbl(selections_LE, scores_LE, tokens_L1).tolist(),
            "lbl_micro": (lbl_micro_L1 / ranks_L1).squeeze(1).tolist(),
            "max_vio": (selections_LE.amax(dim=1) / selections_LE.mean(dim=1).clamp(min=1e-9) - 1).tolist(),
        }
        self._append(line, facts, list(observed), num_experts)

    def _append(self, line: dict, facts: RouterFacts, layers: list[str], num_experts: int) -> None:
        lines = [line]
        if self._path is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._path = self._directory / f"balance.pp{facts.pipeline_stage}.jsonl"
            numbers = [int(key) if key.isdigit() else key for key in layers]
            header = {"format": FORMAT, "scope": self._scope, "num_experts": num_experts, "topk": facts.topk}
            lines.insert(0, {**header, "layers": numbers})
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in lines)


def _lbl(selections: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    """E * sum_i f_i p_i over the last dimension; 0 where nothing was counted."""
    frequencies = selections / selections.sum(dim=-1, keepdim=True).clamp(min=1)
    return selections.shape[-1] * (frequencies * scores / tokens.clamp(min=1)).sum(dim=-1)
