"""The public verbs: `register`, `registered`, `end_step`, and the handle that undoes them."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Union

from megatron_global_lbl.settings import VARIABLE, ConfigError, Scope, Settings

if TYPE_CHECKING:
    from torch import nn

    from megatron_global_lbl.metrics.directory import RecordDirectory

Model = Union["nn.Module", "list[nn.Module]"]

_active: Handle | None = None
was_used = False
"""Whether this process has ever registered."""


def _nothing(settings: Settings) -> None: ...


ask_first: Callable[[Settings], None] = _nothing
"""Called by `register`: startup.py ends the registration of the environment variable if that is for other settings."""


class Handle:
    """One registration.

    Attributes:
        settings: what was registered, defaults filled in.
        by_environment: by the variable MEGATRON_GLOBAL_LBL (startup.py).
        hooked: dotted paths of the Megatron symbols that are replaced.
        loss_paths: by MoE layer, how its last forward in scope computed the loss: "fused: ..." by Triton kernels, or "plain:
            ..." with the reason. The environment variable MEGATRON_GLOBAL_LBL_FUSED chooses (core/fused/choice.py).
    """

    def __init__(self, settings: Settings, iteration: Callable[[], int] | None = None, by_environment: bool = False) -> None:
        # Here, because the flags and `megatron-lbl patch` must work without PyTorch.
        import torch

        from megatron_global_lbl.core.forward import Forwards
        from megatron_global_lbl.core.step import Steps
        from megatron_global_lbl.hook.announcement import Announcement
        from megatron_global_lbl.hook.compatibility import pipeline_group
        from megatron_global_lbl.hook.patching import Patches
        from megatron_global_lbl.hook.step import StepHooks, current_iteration
        from megatron_global_lbl.hook.versions import installed_version, require_supported
        from megatron_global_lbl.metrics.metrics import Metrics

        require_supported()
        self.settings = settings
        self.by_environment = by_environment
        clock = current_iteration if iteration is None else iteration
        self._directory: RecordDirectory | None = None
        self._metrics: Metrics | None = None
        if settings.observes:
            from megatron_global_lbl import __version__

            versions = {"megatron_core": installed_version(), "torch": torch.__version__, "megatron_global_lbl": __version__}
            self._metrics = Metrics(settings, versions, current_iteration, pipeline_group)
        self._steps = Steps(settings, clock, self._metrics)
        self._forwards = Forwards(self._steps)
        self._announcement = Announcement(settings)
        self._patches = Patches()
        self._hooks: StepHooks | None = None
        self._stop_waiting: list[Callable[[], None]] = []
        try:
            if by_environment and self._metrics is not None:  # many processes register, and one of them writes
                self._metrics.before_first = self._hold_directory
            else:
                self._hold_directory()
            self._install()
        except BaseException:
            self._let_go()
            self._patches.restore()
            raise

    def _let_go(self) -> None:
        for stop in self._stop_waiting:
            stop()
        if self._hooks is not None:
            self._hooks.remove()
        if self._metrics is not None:
            self._metrics.close()
        if self._directory is not None:
            self._directory.release()

    def _install(self) -> None:
        if self.settings.scope is Scope.MICRO and self._metrics is None:
            return  # Megatron as it is
        from megatron_global_lbl.hook import imports, metrics_log, recompute, rerun, router, step, versions

        versions.say_preview()

        bypasses = router.install(self._patches, self._forwards)
        recompute.install(self._patches, self._forwards.recompute)
        self._hooks = step.StepHooks(self._steps, bypasses, self._announcement)
        step.install(self._patches, self._steps, self._hooks)
        rerun.install(self._patches, self._steps)
        # Megatron-Core can be used without the training loop, whose log shows the metrics; and a script may import that loop
        # after it has registered.
        if self._metrics is not None:
            show = functools.partial(metrics_log.install, self._patches, self._metrics)
            self._stop_waiting.append(imports.when_imported(metrics_log.TRAINING, show))

    def _hold_directory(self) -> None:
        from megatron_global_lbl.metrics.directory import RecordDirectory

        if self.settings.metrics_dir is not None and self._metrics is not None and self._directory is None:
            self._directory = self._metrics.directory = RecordDirectory(self.settings.metrics_dir)

    @property
    def hooked(self) -> list[str]:
        return self._patches.paths

    @property
    def loss_paths(self) -> dict[str, str]:
        return self._steps.loss_paths

    @property
    def has_acted(self) -> bool:
        """True once a router was trained in this process."""
        return self._steps.was_used

    def remove(self) -> None:
        """Restore every patched symbol. Idempotent.

        Raises:
            RuntimeError: one of them was replaced by other code since (the others are restored).
        """
        global _active
        if _active is self:
            _active = None
        self._let_go()
        try:
            self._steps.close()
        finally:
            self._patches.restore()

    def metrics(self) -> dict[str, float]:
        """The balance since the last call, as Megatron's log shows it, for a custom training loop.

        A collective: call it on every rank, after a step's end.

        Returns:
            Numbers by key "moe_lbl/..." (docs/metrics.md), the same on every rank.

        With `metrics_dir` every step is an interval of the record, and this gives the last one.

        Raises:
            ConfigError: neither `metrics` nor `metrics_dir` was registered.
        """
        if self._metrics is None:
            raise ConfigError('metrics() needs register(..., metrics="brief") or "detailed", or metrics_dir')
        return self._metrics.now()

    def discard_step(self) -> None:
        """Forget what was counted since the last step's end: a step has failed, in a loop without Megatron's DDP (whose
        `zero_grad_buffer` says so by itself). Call it on every rank."""
        self._steps.discard()


def loss_path_on_gpu() -> str:
    """Which path the loss takes on a GPU, as far as the environment decides it: in words, for `megatron-lbl doctor`."""
    from megatron_global_lbl.core.fused.choice import on_gpu

    return on_gpu()


def active() -> Handle | None:
    """The registration of this process."""
    return _active


def register(
    *,
    scope: str,
    micro_coeff: float = 0.0,
    start_iter: int = 0,
    group_size: int | None = None,
    metrics: str | None = None,
    metrics_dir: str | None = None,
    iteration: Callable[[], int] | None = None,
) -> Handle:
    """Replace the load-balancing loss of every `TopKRouter` in this process.

    Call it before the first training step, on every rank; models built before and after are both covered. The arguments are
    the flags `--moe-lbl-*` (docs/reference.md) without their prefix. Registering twice with the same settings returns the
    handle that exists.

    Args:
        scope: "micro" (Megatron untouched), "dp" or "global".
        micro_coeff: coefficient of a micro-batch LBL that is added.
        start_iter: `micro` before this 0-based iteration.
        group_size: data-parallel ranks per synchronisation group; all if not given.
        metrics: "brief", "detailed" or "off": what Megatron's log and `Handle.metrics` show of the balance; off if not given.
        metrics_dir: where the balance record is written.
        iteration: gives the 0-based iteration, for a training loop other than Megatron's: `start_iter` and the record use it.
            Without it steps are counted from 0.

    Raises:
        ConfigError: a value that is not allowed, or a registration with other settings exists.
        UnsupportedMegatron: no Megatron-Core, an unsupported release, or a symbol that is not where it should be.
    """
    settings = Settings.create(
        scope=scope,
        micro_coeff=micro_coeff,
        start_iter=start_iter,
        group_size=group_size,
        metrics=metrics,
        metrics_dir=metrics_dir,
    )
    ask_first(settings)
    return register_settings(settings, iteration=iteration)


def register_settings(settings: Settings, by_environment: bool = False, iteration: Callable[[], int] | None = None) -> Handle:
    """`register` with checked settings."""
    global _active, was_used
    if _active is not None:
        if _active.settings != settings:
            raise ConfigError(f"registered already with other settings: {_active.settings}; remove that handle first")
        if iteration is not None:
            _active._steps.clock = iteration
        return _active
    _active = Handle(settings, iteration, by_environment)
    if not was_used:
        atexit.register(_say_if_idle)
    was_used = True
    return _active


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say_if_idle() -> None:
    """At exit, on the first rank: the process that registered was not the one that trains. An uncaught error says enough."""
    if _active is None or not _active.hooked or _active.has_acted or hasattr(sys, "last_value") or not is_first_rank():
        return
    scope = _active.settings.scope.value
    if not _active.by_environment:
        text = (
            f"scope {scope} did nothing: no MoE layer was trained in this process. If other processes train (Ray, subprocess), "
            f'set {VARIABLE}="scope={scope}" in their environment'
        )
    elif multiprocessing.parent_process() is None:  # else a data loader's worker, for example
        text = f"{VARIABLE}: no MoE layer was trained in this process, as it should be in a driver or for inference"
    else:
        return
    print(f"> moe-lbl: {text}", file=sys.stderr, flush=True)


@contextmanager
def registered(**settings) -> Iterator[Handle]:
    """`register` for the time of a `with` block; undone on exit, exceptions included, unless it was registered before."""
    before = _active
    handle = register(**settings)
    try:
        yield handle
    finally:
        if handle is not before:
            handle.remove()


def chunk(module: nn.Module) -> None:
    """Name a model chunk whose micro-batches are to be counted, for a model that is not wrapped in Megatron's
    DistributedDataParallel. Call it once per chunk, after `register`, on every rank.

    Each call of the module in training mode is one micro-batch: every rank of the pipeline stage must call it equally often.

    Raises:
        ConfigError: nothing is registered, or the module has no MoE layer for the registration.
    """
    if _active is None:
        raise ConfigError("chunk(model) needs a registration: call megatron_global_lbl.register(...) first")
    if _active._hooks is not None:
        _active._hooks.name_chunk(module)


def end_step(model: Model | None = None) -> None:
    """Mark the end of an optimizer step. Only needed without Megatron's `finalize_model_grads`. Call it on every rank, after
    the step's last backward and before the next forward. Without a registration, or twice in a row, it does nothing.

    Args:
        model: whose step; a module or the list of its chunks. None: every model that ran since its last step's end.

    Raises:
        ConfigError: a forward that was counted has had no backward.
    """
    if _active is not None and _active._hooks is not None:
        if model is not None and not isinstance(model, (list, tuple)):
            model = [model]
        _active._hooks.end(model, _active._patches.lost)
