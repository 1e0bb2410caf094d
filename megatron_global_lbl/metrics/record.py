"""`--moe-lbl-metrics-dir`: one line of JSON per optimizer step with the balance of every MoE layer, for any scope.

File `balance.<stage>.jsonl`, one per pipeline stage ("pp0", "pp1", ...), written by the stage's first rank; a second model of
the process has "pp0.model2" and so on. The first line, and the first one after every restart, is a header {"format", "scope",
"num_experts", "topk", "layers"}; every other line a step:

    iteration          1-based, as Megatron logs it; after a resume the later line of an iteration counts
    tokens             valid tokens of the global batch
    tokens_per_expert  [L][E] selections over the global batch, exact
    lbl_global         [L] E * sum_i f_i p_i with f and p over the global batch; 1.0 is perfect balance
    lbl_micro          [L] mean over micro-batches and data-parallel ranks of the LBL within each
    max_vio            [L] max load / mean load - 1 over the global batch

It costs two packed reductions per step and one copy to the host on the writing rank. A file that cannot be written any more
is said once, and the training goes on.
Shape suffixes: L layers, F forwards of all layers, E experts; S = 2 E + 1 (selections, summed scores, valid tokens).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.core.collective import Reduction
from megatron_global_lbl.core.layers import Layer
from megatron_global_lbl.settings import ConfigError, Settings, flag

FORMAT = 1


def require_writable(directory: str) -> None:
    """Make the directory if it is not there.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{flag('metrics_dir')} {directory}: {reason}; allowed: a directory that can be written") from None


class BalanceRecord:
    """Observes router forwards and writes one line per step and model."""

    def __init__(self, settings: Settings) -> None:
        assert settings.metrics_dir is not None
        self._directory = Path(settings.metrics_dir)
        self._scope = settings.scope.value
        self._observed: dict[Layer, list[Tensor]] = {}
        self._models: dict[Layer, int] = {}
        self._written: set[Path] = set()
        self._failed = False

    def observe(self, layer: Layer, *, scores: Tensor, selection: Tensor, padding_mask: Tensor | None) -> None:
        """Take the sums of one forward of one layer; shapes as in `RouterForward`."""
        with torch.no_grad():
            tokens = torch.full((), selection.shape[0], dtype=torch.float64, device=scores.device)
            if padding_mask is not None:
                selection = selection & ~padding_mask.unsqueeze(1)
                tokens = (~padding_mask).sum().double()
            # float64 holds integers up to 2^53 exactly, so the counts survive being packed with the scores.
            sums_S = torch.cat([selection.sum(dim=0).double(), scores.detach().double().sum(dim=0), tokens.view(1)])
        self._observed.setdefault(layer, []).append(sums_S)

    def drop(self, layers: list[Layer]) -> None:
        """Forget what these layers did since their last step's end."""
        for layer in layers:
            self._observed.pop(layer, None)

    def end_step(self, layers: list[Layer], iteration: int) -> None:
        """Reduce the step over the stage's ranks and append its line; `iteration` is 0-based."""
        observed = {layer: self._observed.pop(layer) for layer in layers if layer in self._observed}
        # Layers with other experts or ranks have lines of their own.
        kinds = {(layer.info.num_experts, layer.table.group.stage): None for layer in observed}
        for num_experts, stage in kinds:
            alike = {k: v for k, v in observed.items() if (k.info.num_experts, k.table.group.stage) == (num_experts, stage)}
            self._end_step(alike, iteration + 1)

    def _end_step(self, observed: dict[Layer, list[Tensor]], iteration: int) -> None:
        layers = list(observed)
        info, num_experts = layers[0].info, layers[0].info.num_experts
        sums_FS = torch.stack([sums_S for forwards in observed.values() for sums_S in forwards])
        Reduction(sums_FS, info.model, blocking=True).wait()
        selections_FE, scores_FE, tokens_F1 = sums_FS.split([num_experts, num_experts, 1], dim=-1)
        lbl_F1 = _lbl(selections_FE, scores_FE, tokens_F1).unsqueeze(1)
        by_layer = torch.cat([sums_FS, lbl_F1], dim=1).split([len(forwards) for forwards in observed.values()])
        of_ranks = torch.ones_like(lbl_F1[:1])
        step_LS = torch.stack([torch.cat([rows[:, :-1].sum(0), rows[:, -1:].mean(0), of_ranks[0]]) for rows in by_layer])
        Reduction(step_LS, info.stage, blocking=True).wait()
        # Every rank of a TP x CP group brought the group's sums.
        step_LS /= info.model.size()
        if dist.get_rank() != min(dist.get_process_group_ranks(info.stage)) or self._failed:
            return
        try:
            self._append(step_LS.cpu(), layers, iteration)
        except Exception as error:  # what looks on must never end what it looks at
            self._failed = True
            print(
                f"> moe-lbl: !! the balance record in {self._directory} ends before iteration {iteration}: {error}; "
                "the training goes on",
                flush=True,
            )

    def _append(self, step_LS: Tensor, layers: list[Layer], iteration: int) -> None:
        info, num_experts = layers[0].info, layers[0].info.num_experts
        selections_LE, scores_LE, rest_L3 = step_LS.split([num_experts, num_experts, 3], dim=1)
        tokens_L1, lbl_micro_L1, ranks_L1 = rest_L3.split(1, dim=1)
        line = {
            "iteration": iteration,
            "tokens": int(tokens_L1[0].item()),
            "tokens_per_expert": selections_LE.round().long().tolist(),
            "lbl_global": _lbl(selections_LE, scores_LE, tokens_L1).tolist(),
            "lbl_micro": (lbl_micro_L1 / ranks_L1).squeeze(1).tolist(),
            "max_vio": (selections_LE.amax(dim=1) / selections_LE.mean(dim=1).clamp(min=1e-9) - 1).tolist(),
        }
        model = self._models.setdefault(layers[0], len(self._models) + 1)
        name = info.stage_name if model == 1 else f"{info.stage_name}.model{model}"
        path = self._directory / f"balance.{name}.jsonl"
        lines = [line]
        if path not in self._written:
            self._directory.mkdir(parents=True, exist_ok=True)
            keys = [layer.info.key for layer in layers]
            header = {"format": FORMAT, "scope": self._scope, "num_experts": num_experts, "topk": info.topk}
            lines.insert(0, {**header, "layers": [int(key) if key.isdigit() else key for key in keys]})
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in lines)
        self._written.add(path)


def _lbl(selections: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    """E * sum_i f_i p_i over the last dimension; 0 where nothing was counted."""
    frequencies = selections / selections.sum(dim=-1, keepdim=True).clamp(min=1)
    return selections.shape[-1] * (frequencies * scores / tokens.clamp(min=1)).sum(dim=-1)
