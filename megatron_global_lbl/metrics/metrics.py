"""What looks on while a model trains: sums on the device, and once per log interval what they say, for log and record.

An interval ends where Megatron's log says so (hook/training_log.py), at `Handle.metrics()`, or, in a loop of one's own that
writes a record, with every step. Then there is one packed reduction over the ranks of each pipeline stage, one copy to the
host, and, for the log, one exchange of a few numbers between the stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from megatron_global_lbl.core.collective import gather_objects
from megatron_global_lbl.core.layers import Layer
from megatron_global_lbl.core.router_forward import Observed
from megatron_global_lbl.metrics import measures
from megatron_global_lbl.metrics.alarm_log import AlarmLog
from megatron_global_lbl.metrics.frames import RecordError
from megatron_global_lbl.metrics.interval import Interval
from megatron_global_lbl.metrics.layer_names import names_of, numbers_of
from megatron_global_lbl.metrics.writer import Writer
from megatron_global_lbl.settings import ConfigError, Detail, Scope, Settings, flag

PREFIX = "moe-lbl/"


class _Closed(NamedTuple):
    """A model's interval on one pipeline stage: by layer the number in Megatron's log, measures [L], and the balance batch."""

    numbers: list[int]
    values: dict[str, np.ndarray]
    sequences: float
    tokens: float


class Metrics:
    """Observes router forwards; see `core.router_forward.Record`.

    Attributes:
        is_in_log: the training loop's log tells of its intervals (`log`).
    """

    def __init__(
        self,
        settings: Settings,
        versions: Mapping[str, str],
        clock: Callable[[], int | None],
        pipeline: Callable[[], dist.ProcessGroup | None],
    ) -> None:
        """
        Args:
            settings: what was registered.
            versions: of the software, for the record.
            clock: 0-based iteration of Megatron's training loop; None in a loop of one's own.
            pipeline: process group of this rank's pipeline, one rank of each stage; None if there is none.
        """
        self.wants_entropy = settings.metrics is Detail.DETAILED
        self._settings, self._versions, self._clock, self._pipeline = settings, dict(versions), clock, pipeline
        self.is_in_log = False
        self._started = time.time()
        self._observed: dict[Layer, list[Observed]] = {}
        self._models: dict[tuple[Layer, ...], Interval] = {}
        self._met = 0
        self._gone: set[Layer] = set()
        self._writers: dict[int, Writer] = {}
        self._alarms: dict[int, AlarmLog] = {}
        self._iteration = 0
        self._latest: dict[int, _Closed] = {}
        self._failed = self._broken = self._quiet = False

    def observe(self, layer: Layer, observed: Observed) -> None:
        """A forward of a layer."""
        self._observed.setdefault(layer, []).append(observed)

    def refuse_capture(self) -> None:
        """
        Raises:
            ConfigError: always. A replayed CUDA graph runs no Python.
        """
        name = "metrics" if self._settings.metrics_dir is None else "metrics_dir"
        value = getattr(self._settings.metrics, "value", None) if name == "metrics" else self._settings.metrics_dir
        raise ConfigError(
            f"{flag(name)} {value} is not supported with CUDA graphs of the router; allowed: without it, or graphs of other "
            "modules"
        )

    def drop(self, layers: list[Layer]) -> None:
        """Forget what these layers did since their last step's end."""
        for layer in layers:
            self._observed.pop(layer, None)

    def end_step(self, layers: list[Layer], iteration: int) -> None:
        """The step of these layers is over; `iteration` is 0-based."""
        observed = {layer: self._observed.pop(layer) for layer in layers if layer in self._observed}
        self._iteration = iteration + 1
        # Layers with other experts or ranks are a model of their own.
        for kind in {(layer.info.num_experts, layer.info.topk, layer.table.group.stage): None for layer in observed}:
            alike = tuple(x for x in observed if (x.info.num_experts, x.info.topk, x.table.group.stage) == kind)
            if alike not in self._models:
                self._met += 1
                self._models[alike] = Interval(alike, self._met)
            self._models[alike].add_step([observed[layer] for layer in alike])
        if self._settings.metrics_dir is not None and not (self.is_in_log and self._clock() is not None):
            self._latest = self._close(self._iteration, 1) or self._latest

    def repeat_step(self, layers: list[Layer]) -> None:
        """The step of these layers that ended last is run again."""
        for model, interval in self._models.items():
            if any(layer in layers for layer in model):
                interval.take_back()

    def forget(self, layers: list[Layer]) -> None:
        """These layers are gone. An interval that has begun is still told: to end it is a collective."""
        self._gone.update(layers)
        self._forget_what_is_told()

    def _forget_what_is_told(self) -> None:
        for model in [model for model, interval in self._models.items() if not interval.steps and self._gone.issuperset(model)]:
            number = self._models.pop(model).number
            self._writers.pop(number, None)
            self._alarms.pop(number, None)
            self._gone.difference_update(model)

    def settle(self) -> None:
        """Leave no reduction under way."""
        for interval in self._models.values():
            interval.settle()

    def log(self, log_interval: int, iteration: int) -> dict[str, float]:
        """A log interval of Megatron's training loop ends, with this 1-based iteration; what its log shows. On all ranks."""
        closed = self._close(iteration, log_interval)
        return self._summary(closed) if self._settings.shows_metrics else {}

    def now(self) -> dict[str, float]:
        """What the log would show; an interval that has begun ends. On all ranks."""
        self._latest = self._close(self._iteration, None) or self._latest
        return self._summary(self._latest)

    def _close(self, iteration: int, log_interval: int | None) -> dict[int, _Closed]:
        """By the model's number; the record is written."""
        closed = {}
        for layers, interval in self._models.items():
            if not interval.steps:
                continue
            number, steps, forwards, sequences = interval.number, interval.steps, interval.forwards, interval.sequences
            info, experts = layers[0].info, layers[0].info.num_experts
            sums_LS = interval.close()
            counts_LE, score_sums_LE, rest = sums_LS[:, :experts], sums_LS[:, experts : 2 * experts], sums_LS[:, 2 * experts :]
            values = measures.measures(
                counts_LE=counts_LE,
                score_sums_LE=score_sums_LE,
                entropy_sums_L=rest[:, 0],
                lbl_sums_L=rest[:, 1],
                micro_batches_L=rest[:, 2],
                topk=info.topk,
            )
            part = self._part_of_interval(layers[0], steps, forwards, iteration)
            ranks = info.data_parallel_size
            closed[number] = _Closed(
                numbers_of(layers), values, sequences * ranks * part, float(counts_LE[0].sum()) / info.topk * part
            )
            about = {
                "scope": self._settings.scope.value,
                "settings": {name: getattr(value, "value", value) for name, value in vars(self._settings).items()},
                **{"alpha": interval.coeff, "topk": info.topk, "data_parallel": ranks},
                **{"micro_batches": round(forwards / steps / info.applications), "log_interval": log_interval or steps},
                **{"versions": self._versions, "started": self._started},
            }
            if info.leads_stage:
                interval_values = {
                    "iteration": iteration,
                    "steps": steps,
                    "values": values,
                    "load": measures.load(counts_LE),
                    "sequences": closed[number].sequences,
                    "tokens": closed[number].tokens,
                }
                self._write(number, layers, about, interval_values)
                self._warn(number, layers, about, interval_values)
        self._forget_what_is_told()
        return closed

    def _part_of_interval(self, layer: Layer, steps: int, forwards: int, iteration: int) -> float:
        """How much of what the interval counted a mean balance batch has."""
        settings, info = self._settings, layer.info
        repeated = 1 / info.applications
        scope = settings.scope if info.acts and iteration > settings.start_iter else Scope.MICRO
        ranks = info.data_parallel_size
        of_ranks = (settings.group_size or ranks) / ranks
        if scope is Scope.MICRO:
            return 1 / (ranks * forwards)
        if scope is Scope.DP:
            return of_ranks / forwards
        return of_ranks / steps * repeated * (settings.window_steps or 1)

    def _write(self, number: int, layers: tuple[Layer, ...], about: dict[str, Any], interval: dict[str, Any]) -> None:
        """One interval of the record; `interval` as `Writer.append` takes it."""
        directory = self._settings.metrics_dir
        if directory is None or self._broken:
            return
        try:
            if number not in self._writers:
                info = layers[0].info
                self._writers[number] = Writer(
                    directory,
                    model=f"model{number}",
                    stage=info.stage_name,
                    layers=names_of(layers),
                    num_experts=info.num_experts,
                    about=about,
                )
            self._writers[number].append(**interval)
        except Exception as error:  # what looks on must never end what it looks at
            self._broken = isinstance(error, RecordError)
            if not self._failed:
                goes_on = "nothing more is written to it" if self._broken else "every later interval is tried"
                print(
                    f"> moe-lbl: !! the balance record in {directory} lacks the interval that ends with iteration "
                    f"{interval['iteration']}: {error}; the training goes on, and {goes_on}",
                    flush=True,
                )
            self._failed = True

    def _warn(self, number: int, layers: tuple[Layer, ...], about: dict[str, Any], interval: dict[str, Any]) -> None:
        """Say what is wrong with the balance, each cause once."""
        if self._quiet:
            return
        if number not in self._alarms:
            first_stage = layers[0].info.stage_name == "pp0" or not layers[0].info.stage_name.startswith("pp")
            self._alarms[number] = AlarmLog(names_of(layers), layers[0].info.num_experts, first_stage=first_stage)
        known = {name: value for name, value in interval.items() if name != "tokens"}
        try:
            lines = self._alarms[number].add(about, **known)
        except Exception as error:  # as above
            self._quiet = True
            lines = [f"!! no alarms from iteration {interval['iteration']} on: {error}; the training goes on"]
        for line in lines:
            print(f"> moe-lbl: {line}", flush=True)

    def _summary(self, closed: dict[int, _Closed]) -> dict[str, float]:
        """Over all layers of each model, from all pipeline stages; stages without MoE layers take part."""
        pipeline = self._pipeline()
        stages = [closed] if pipeline is None or pipeline.size() == 1 else gather_objects(closed, pipeline)
        result: dict[str, float] = {}
        for number in sorted({number for stage in stages for number in stage}):
            parts = [stage[number] for stage in stages if number in stage]
            prefix = PREFIX if number == 1 else f"{PREFIX}model{number}/"
            values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
            found = measures.summary(
                values,
                [number for part in parts for number in part.numbers],
                detailed=self._settings.metrics is Detail.DETAILED,
            )
            found |= {"balance_sequences": parts[0].sequences, "balance_tokens": parts[0].tokens}
            result |= {prefix + name: value for name, value in found.items()}
        return result
