"""What the tests compare, as a callback of ms-swift; given as `--external_plugins swift_report.py --report_to report`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from common import checksum
from megatron.core.transformer.moe.router import TopKRouter
from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map

from megatron_global_lbl.registry import active


class Report(MegatronCallback):
    """Rank 0 writes `report.jsonl` in the output folder: a line per step, and at the end the ranks' checksums of the model."""

    def on_train_begin(self) -> None:
        self.layers: dict[int, torch.Tensor] = {}  # selections [E], scores [E], valid tokens [1], of the step on this rank
        for chunk in self.trainer.unwrapped_models:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self.count, with_kwargs=True)

    @torch.no_grad()
    def count(self, router, args, kwargs, output) -> None:
        """Counts in float64, from what goes into the router and what it selects."""
        hidden, mask = (*args, kwargs.get("padding_mask"))[:2]
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else ~mask
        scores = torch.softmax(hidden.double() @ router.weight.double().T, dim=-1)[valid]
        selected = output[1].reshape(*hidden.shape[:2], -1)[valid]
        sums = torch.cat([selected.sum(0).double(), scores.sum(0), valid.sum().double()[None]])
        self.layers[router.layer_number] = self.layers.get(router.layer_number, 0) + sums

    def on_step_end(self) -> None:
        losses = []
        for number in sorted(self.layers):
            sums = self.layers[number]
            dist.all_reduce(sums)
            experts = len(sums) // 2
            selections, scores, tokens = sums[:experts], sums[experts : 2 * experts], sums[-1]
            losses.append(float(experts * (selections / selections.sum() * scores / tokens).sum()))
        self.layers = {}
        self.expected = {"global": sum(losses) / len(losses), "tokens": float(tokens)}

    def on_log(self, logs) -> None:
        handle = active()
        metrics = handle.metrics() if handle is not None and handle.settings.observes else {}
        self.write({"logged": logs["load_balancing_loss"], **self.expected, "metrics": metrics})

    def on_train_end(self) -> None:
        checksums = [""] * dist.get_world_size()
        dist.all_gather_object(checksums, checksum(self.trainer.unwrapped_models))
        self.write(checksums)

    def write(self, line: dict | list) -> None:
        if dist.get_rank() == 0:
            with (Path(self.args.output_dir) / "report.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


megatron_callbacks_map["report"] = Report
