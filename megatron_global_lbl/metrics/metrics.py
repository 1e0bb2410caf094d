"""The balance while a model trains: sums on the device, and once per log interval the measures, for log and record.

An interval ends where Megatron's log says so (hook/metrics_log.py), at `Handle.metrics()`, or, in a custom training loop that
writes a record, with every step. Then there is one reduction over the ranks of each pipeline stage, one copy to the host, and
one exchange between the stages, of measures and loads: rank 0 writes the record of the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from megatron_global_lbl.core.chunk import Chunk, Layer, MicroBatch
from megatron_global_lbl.core.collective import gather_objects, is_capturing
from megatron_global_lbl.metrics import measures
from megatron_global_lbl.metrics.directory import RecordDirectory
from megatron_global_lbl.metrics.interval import Interval, Recorded, Sums
from megatron_global_lbl.metrics.live_alarms import LiveAlarms
from megatron_global_lbl.metrics.writer import Recorder
from megatron_global_lbl.settings import Detail, Settings

PREFIX = "moe_lbl/"


class _Closed(NamedTuple):
    """A model's interval, on one pipeline stage or on all: by layer its name, its number in Megatron's log, measures [L] and
    load [L, E]; and the mean balance batch."""

    first: int
    iteration: int
    steps: int
    names: list[str]
    numbers: list[int]
    values: dict[str, np.ndarray]
    load: np.ndarray
    sequences: float
    tokens: float
    micro_sequences: float
    num_experts: list[int]
    topk: list[int]
    about: dict[str, Any]

    def interval(self) -> dict[str, Any]:
        """The arguments of `Writer.append` and `LiveAlarms.add`."""
        names = ("first", "iteration", "steps", "values", "load", "sequences", "tokens", "micro_sequences")
        return {name: getattr(self, name) for name in names}


class Metrics:
    """Observes micro-batches; see `core.observer.Observer`.

    Attributes:
        is_in_log: Megatron's log says where an interval ends (`log`).
        directory: of the record, locked by this training; None if there is none.
        before_first: called once, before the first micro-batch is recorded.
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
            settings: the registration's.
            versions: of the software, for the record.
            clock: 0-based iteration of Megatron's training loop; None in a custom training loop.
            pipeline: process group of this rank's pipeline, one rank of each stage; None if there is none.
        """
        self.wants_extras = settings.metrics is Detail.DETAILED
        self._settings, self._versions, self._clock, self._pipeline = settings, dict(versions), clock, pipeline
        self.is_in_log = False
        self._started = time.time()
        self._batches: dict[Chunk, list[Recorded]] = {}
        self._capturing: dict[Chunk, list[Recorded]] = {}
        self._captured: dict[Chunk, list[Recorded]] = {}  # in CUDA graphs of whole steps: each replay fills them anew
        self._intervals: dict[int, dict[Chunk, Interval]] = {}  # by model
        self.directory: RecordDirectory | None = None
        self.before_first: Callable[[], None] | None = None
        self._recorder: Recorder | None = None
        self._alarms: dict[int, LiveAlarms] = {}
        self._iteration = 0
        self._closed_to: int | None = None  # the last iteration of the interval that ended last
        self._since: dict[int, dict[Chunk, Sums]] = {}  # since the last `now`
        self._quiet = False

    def add(self, batch: MicroBatch) -> None:
        """A micro-batch has closed."""
        if self.before_first is not None:
            before_first, self.before_first = self.before_first, None
            before_first()
        # Not the micro-batch: its gradient rows are not needed any more once its backward is over.
        recorded = Recorded(batch.counts_RE, batch.sums_RE, batch.extras_RX, batch.sequences)
        self._batches.setdefault(batch.chunk, []).append(recorded)
        if is_capturing(batch.counts_RE):
            self._capturing.setdefault(batch.chunk, []).append(recorded)

    def drop(self, chunks: list[Chunk]) -> None:
        """Forget the micro-batches of these chunks since their last step's end."""
        for chunk in chunks:
            self._batches.pop(chunk, None)

    def end_step(self, model: int, chunks: list[Chunk], iteration: int) -> None:
        """The step of a model is over; `iteration` is 0-based."""
        intervals = self._intervals.setdefault(model, {})
        for chunk in chunks:
            if chunk in self._capturing:  # a graph is captured anew after an overflow
                self._captured[chunk] = self._capturing.pop(chunk)
            batches = self._batches.pop(chunk, None) or self._captured.get(chunk, [])
            if chunk not in intervals:
                intervals[chunk] = Interval(chunk)
            intervals[chunk].add_step(chunk, batches)
        if chunks:
            self._iteration = iteration + 1
            self._closed_to = iteration if self._closed_to is None else self._closed_to
        if self._settings.metrics_dir is not None and not (self.is_in_log and self._clock() is not None):
            self._close(self._iteration, 1)

    def take_back(self, chunks: list[Chunk]) -> None:
        """The step of these chunks that ended last is run again."""
        for intervals in self._intervals.values():
            for chunk in chunks:
                if chunk in intervals:
                    intervals[chunk].take_back()

    def settle(self) -> None:
        """Leave no reduction under way."""
        for intervals in self._intervals.values():
            for interval in intervals.values():
                interval.settle()

    def log(self, log_interval: int, iteration: int) -> dict[str, float]:
        """A log interval of Megatron's training loop ends, with this 1-based iteration; what its log shows. On all ranks."""
        closed = self._close(iteration, log_interval)
        return self._summary(closed) if self._settings.shows_metrics else {}

    def now(self) -> dict[str, float]:
        """The balance since the last call; an interval that has begun ends. On all ranks."""
        self._close(self._iteration, None)
        since, self._since = self._since, {}
        return self._summary(self._of_all_stages(since, self._iteration, None))

    def _close(self, iteration: int, log_interval: int | None) -> dict[int, _Closed]:
        """End the intervals; the record is written. By the model's number."""
        here: dict[int, dict[Chunk, Sums]] = {}
        for model, intervals in list(self._intervals.items()):
            for chunk, interval in list(intervals.items()):
                if interval.steps:
                    here.setdefault(model, {})[chunk] = sums = interval.close()
                    since = self._since.setdefault(model, {})
                    if chunk in since:
                        since[chunk].add(sums)
                    else:
                        since[chunk] = replace(sums, balance_R=sums.balance_R.clone(), sums_LS=sums.sums_LS.clone())
                if all(layer.router is None for layer in chunk.layers):  # the model is gone
                    del intervals[chunk]
            if not intervals:
                del self._intervals[model]
        closed = self._of_all_stages(here, iteration, log_interval)
        if here:
            self._closed_to = iteration
        if dist.get_rank() == 0:
            for model, of_model in closed.items():
                self._write(model, of_model)
                self._warn(model, of_model)
        return closed

    def _of_all_stages(
        self, sums: dict[int, dict[Chunk, Sums]], iteration: int, log_interval: int | None
    ) -> dict[int, _Closed]:
        """Exchange the measures over the pipeline. Stages without MoE layers take part."""
        here = {
            model: [self._of_chunk(chunk, of_chunk, iteration, log_interval) for chunk, of_chunk in of_model.items()]
            for model, of_model in sums.items()
        }
        pipeline = self._pipeline()
        stages = [here] if pipeline is None or pipeline.size() == 1 else gather_objects(here, pipeline)
        return {
            model: _together([part for stage in stages for part in stage.get(model, [])])
            for model in sorted({model for stage in stages for model in stage})
        }

    def _of_chunk(self, chunk: Chunk, sums: Sums, iteration: int, log_interval: int | None) -> _Closed:
        steps, batches, balanced = sums.steps, sums.micro_batches, sums.balanced
        sums_LS = sums.sums_LS.numpy()
        layers, experts, extras = chunk.layers, chunk.experts, chunk.extras
        first = layers[0].info
        topk_L, experts_L = (np.array([getattr(x.info, name) for x in layers]) for name in ("topk", "num_experts"))
        counts_LE, scores_LE, rest = np.split(sums_LS, [experts, 2 * experts], axis=1)
        unknown_L = np.where(scores_LE.sum(axis=1) > 0, 0.0, np.nan)  # a layer may have none
        values = measures.measures(
            counts_LE=counts_LE,
            score_sums_LE=scores_LE + unknown_L[:, None],
            extras_LX=rest[:, :extras] + unknown_L[:, None],
            lbl_sums_L=rest[:, extras] + unknown_L,
            micro_batches_L=rest[:, extras + 1],
            topk=topk_L,
            experts=experts_L,
            expert_parallel=first.expert_parallel,
        )
        if self.wants_extras:
            values |= _biases(layers)
        if balanced:
            sequences = sums.balance_sequences / balanced
            tokens = max(sums.balance_R.numpy() / chunk.selections_per_token) / balanced
        else:  # each micro-batch by itself
            sequences = sums.sequences / max(batches, 1)
            applications_L = np.array([layer.info.applications for layer in layers])
            tokens = float((counts_LE.sum(axis=1) / topk_L / applications_L).max()) / max(batches * first.data_parallel_size, 1)
        about = {
            "scope": self._settings.scope.value,
            "settings": {name: getattr(value, "value", value) for name, value in vars(self._settings).items()},
            "balancing": sorted({kind for layer in layers for kind in layer.info.balancing}),
            **{"alpha": _alpha(layers), "topk": first.topk, "data_parallel": first.data_parallel_size},
            **{"micro_batches": round(batches / steps), "log_interval": log_interval or steps},
            **{"versions": self._versions, "started": self._started},
        }
        before = iteration - steps if self._closed_to is None else self._closed_to
        return _Closed(
            before + 1 if before < iteration else iteration - steps + 1,  # otherwise it went back to a checkpoint
            iteration,
            steps,
            [layer.info.key for layer in layers],
            [layer.info.number for layer in layers],
            values,
            measures.load(counts_LE, experts_L).astype(np.float32),
            sequences,
            tokens,
            sums.sequences / max(batches, 1),
            [layer.info.num_experts for layer in layers],
            [layer.info.topk for layer in layers],
            about,
        )

    def close(self) -> None:
        """Write what waits to be written. Idempotent."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()

    def _write(self, number: int, interval: _Closed) -> None:
        if self._settings.metrics_dir is None:
            return
        if self._recorder is None:
            self._recorder = Recorder(self.directory or self._settings.metrics_dir, start=interval.first)
        self._recorder.append(
            f"model{number}",
            layers=interval.names,
            num_experts=interval.num_experts,
            topk=interval.topk,
            about=interval.about,
            **interval.interval(),
        )

    def _warn(self, number: int, interval: _Closed) -> None:
        """Say what is wrong with the balance, each cause once."""
        if self._quiet:
            return
        try:
            if number not in self._alarms:
                self._alarms[number] = LiveAlarms(interval.names, interval.num_experts)
            lines = self._alarms[number].add(interval.about | {"topk": interval.topk}, **interval.interval())
        except Exception as error:  # must never end the training
            self._quiet = True
            lines = [f"!! no alarms from iteration {interval.iteration} on: {error}; the training goes on"]
        for line in lines:
            print(f"> moe-lbl: {line}", flush=True)

    def _summary(self, closed: dict[int, _Closed]) -> dict[str, float]:
        """Over all layers of each model."""
        result: dict[str, float] = {}
        for number, interval in closed.items():
            prefix = PREFIX if number == 1 else f"{PREFIX}model{number}/"
            detailed = self._settings.metrics is Detail.DETAILED
            found = measures.summary(interval.values, detailed=detailed)
            if found:  # otherwise nothing was counted
                found |= {"balance_sequences": interval.sequences, "balance_tokens": interval.tokens}
            result |= {prefix + name: value for name, value in found.items()}
        return result


def _together(parts: list[_Closed]) -> _Closed:
    """One model's interval from those of its chunks, layers in the model's order; missing experts of a layer are NaN. Pipeline
    stages count over different balance batches: a mean over layers."""
    numbers = [number for part in parts for number in part.numbers]
    order = sorted(range(len(numbers)), key=lambda index: numbers[index])
    names = _distinct([name for part in parts for name in part.names])
    experts = max(part.load.shape[1] for part in parts)
    loads = [np.pad(part.load, ((0, 0), (0, experts - part.load.shape[1])), constant_values=np.nan) for part in parts]
    return parts[0]._replace(
        names=[names[index] for index in order],
        numbers=[numbers[index] for index in order],
        values={name: np.concatenate([part.values[name] for part in parts])[order] for name in parts[0].values},
        num_experts=[sum((part.num_experts for part in parts), [])[index] for index in order],
        topk=[sum((part.topk for part in parts), [])[index] for index in order],
        micro_sequences=max(part.micro_sequences for part in parts),
        load=np.concatenate(loads)[order],
        sequences=sum(part.sequences * len(part.names) for part in parts) / len(names),
        tokens=sum(part.tokens * len(part.names) for part in parts) / len(names),
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """A name that comes again (multi-token prediction before Megatron-Core 0.17) gets a number."""
    found: dict[str, int] = {}
    result = []
    for name in names:
        found[name] = found.get(name, 0) + 1
        result.append(f"{name}#{found[name]}" if found[name] > 1 else name)
    return result


def _alpha(layers: Sequence[Layer]) -> float:
    """The coefficient of the loss that the scope acts on, as it was last; 0 without one."""
    return max((layer.loss.coeff * layer.info.applications for layer in layers if layer.loss is not None), default=0.0)


def _biases(layers: Sequence[Layer]) -> dict[str, np.ndarray]:
    """What the expert biases are at the end of the interval; NaN without one."""
    biases = [layer.info.bias() for layer in layers]
    values = [(np.nan, np.nan) if b is None else (float(b.max() - b.min()), float(b.abs().max())) for b in biases]
    return {name: np.array([value[index] for value in values]) for index, name in enumerate(("bias_spread", "bias_largest"))}
