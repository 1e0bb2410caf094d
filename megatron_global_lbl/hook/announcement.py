"""Logs what the routers of a model did: after its first step, and again when it changes."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron_global_lbl.core.chunk import ChunkReport
from megatron_global_lbl.core.collective import gather_objects
from megatron_global_lbl.core.step import Ended
from megatron_global_lbl.hook import compatibility
from megatron_global_lbl.settings import Scope, Settings

LOG_INTERVAL = 100
"""Megatron's default, where its arguments are not there."""


def _of_stage(reports: list[ChunkReport]) -> ChunkReport:
    """What the layers of a model did on one pipeline stage."""
    return reports[0]._replace(
        with_loss=[name for report in reports for name in report.with_loss],
        acted=[name for report in reports for name in report.acted],
        paths=[path for report in reports for path in report.paths],
        biased=any(report.biased for report in reports),
        balance_selections=None,
    )


class Announcement:
    """Of one registration."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._logged: dict[int, tuple[ChunkReport, int] | None] = {}  # by model, with the iteration
        self._speaks: dict[int, bool] = {}  # by model of several stages: this rank prints when something changes

    def step_ended(self, ended: Ended, module: nn.Module | None) -> None:
        """A collective over the pipeline at a model's first step end, if its chunk `module` says that it has several stages."""
        if self._settings.scope is Scope.MICRO or ended.iteration < self._settings.start_iter:
            return
        reports = [report for report in ended.reports if report.with_loss]
        here = _of_stage(reports) if reports else None
        first = ended.model not in self._logged
        if not first and not self._changed(ended, here):
            return
        tokens = None  # copied from the device, which is why this is not done in every step
        balance = [(r.balance_selections, r.selections_per_token) for r in reports if r.balance_selections is not None]
        if balance:
            tokens = max(n / k for selections, per_token in balance for n, k in zip(selections.tolist(), per_token))
        speaks, stages = bool(reports) and reports[0].leads_stage, [(here, tokens)]
        if first:
            pipeline = compatibility.pipeline_of(module)
            if pipeline is not None:
                stages = gather_objects((here, tokens), pipeline)
                with_moe = [index for index, (stage, _) in enumerate(stages) if stage is not None]
                self._speaks[ended.model] = speaks and with_moe[0] == pipeline.rank()
                speaks = dist.get_rank() == 0
        elif ended.model in self._speaks:
            speaks = self._speaks[ended.model]
        self._logged[ended.model] = None if here is None else (here, ended.iteration)
        there = [(stage, t) for stage, t in stages if stage is not None]
        if there and speaks:
            print(f"> moe-lbl: {self._line(ended, there)}", flush=True)

    def _changed(self, ended: Ended, here: ChunkReport | None) -> bool:
        logged = self._logged[ended.model]
        if logged is None or here is None or here == logged[0]:
            return False
        return ended.iteration - logged[1] >= log_interval()

    def _line(self, ended: Ended, stages: list[tuple[ChunkReport, float | None]]) -> str:
        first = stages[0][0]
        with_loss = sum(len(stage.with_loss) for stage, _ in stages)
        acted = sum(len(stage.acted) for stage, _ in stages)
        paths = [path for stage, _ in stages for path in stage.paths]
        kinds = {path: paths.count(path) for path in dict.fromkeys(paths)}
        path = "; ".join(f"{name}" if len(kinds) == 1 else f"{name} ({count} layers)" for name, count in kinds.items())
        scope = self._settings.scope
        size = f"{first.sequences:g} sequence{'s' * (first.sequences != 1)}"
        if scope is Scope.GLOBAL:
            whole = first.ranks * first.micro_batches * first.sequences
            batch = f"{whole:g} sequences ({first.ranks} dp ranks x {first.micro_batches} micro-batches x {size})"
        else:
            whole = first.ranks * first.sequences
            batch = f"{whole:g} sequences ({first.ranks} dp ranks x {size})"
        counted = sum(stage.balance_sequences * len(stage.with_loss) for stage, _ in stages) / with_loss  # stages differ
        mean = f"on average over the step's micro-batches f was counted over {counted:g} sequences"
        if all(t is not None for _, t in stages):
            mean += f", {sum((t or 0) * len(stage.with_loss) for stage, t in stages) / with_loss:.0f} tokens"
        model = f"model {ended.model}: " if ended.model > 1 else ""
        text = (
            f"{model}iteration {ended.iteration + 1}: scope {scope.value} acted on {acted} of {with_loss} MoE layers with "
            f"a loss; the balance batch is {batch}; {mean}"
        )
        if path:
            text += f"; {path}"
        if any(stage.biased for stage, _ in stages):
            text += "; the expert bias asks for an even load over the global batch, too, so the loss' gradient is small"
        if acted < with_loss:
            idle = [name for stage, _ in stages for name in stage.with_loss if name not in stage.acted]
            text = f"!! {text}; not on layer(s) {', '.join(idle)}"
        if acted and whole <= first.sequences:
            text += f"; !! that is what scope micro counts: {scope.value} needs more data-parallel ranks or micro-batches"
        return text


def log_interval() -> int:
    """Megatron's `--log-interval`."""
    arguments: Any = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    return getattr(arguments, "log_interval", LOG_INTERVAL)
