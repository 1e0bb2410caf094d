"""The public verbs: `register`, `registered`, `end_step`, and the handle that undoes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Union

from megatron_global_lbl.settings import ConfigError, Scope, Settings

if TYPE_CHECKING:
    from torch import nn

Model = Union["nn.Module", "list[nn.Module]"]
STATE_FORMAT = 2

_active: Handle | None = None


class Handle:
    """One registration.

    Attributes:
        settings: what was registered, defaults filled in.
        hooked: dotted paths of the Megatron symbols that are replaced.
        loss_paths: by MoE layer, how its last forward in scope computed the loss: "fused: ..." by Triton kernels, or "plain:
            ..." with the reason. The environment variable MEGATRON_GLOBAL_LBL_FUSED chooses (core/fused/choice.py).
    """

    def __init__(self, settings: Settings) -> None:
        # Here, because the flags and `megatron-lbl patch` must work without PyTorch.
        import torch

        from megatron_global_lbl.core.engine import Engine
        from megatron_global_lbl.hook.compatibility import pipeline_group
        from megatron_global_lbl.hook.patching import Patches
        from megatron_global_lbl.hook.step import current_iteration
        from megatron_global_lbl.hook.versions import installed_version, require_supported
        from megatron_global_lbl.metrics.directory import RecordDirectory
        from megatron_global_lbl.metrics.metrics import Metrics

        require_supported()
        self.settings = settings
        self._directory: RecordDirectory | None = None
        self._metrics: Metrics | None = None
        if settings.observes:
            from megatron_global_lbl import __version__

            versions = {"megatron_core": installed_version(), "torch": torch.__version__, "megatron_global_lbl": __version__}
            self._metrics = Metrics(settings, versions, current_iteration, pipeline_group)
        self._engine = Engine(settings, current_iteration, self._metrics)
        self._patches = Patches()
        self._stop_waiting: list[Callable[[], None]] = []
        try:
            if settings.metrics_dir is not None:
                self._directory = RecordDirectory(settings.metrics_dir)
            self._install()
        except BaseException:
            self._let_go()
            self._patches.restore()
            raise

    def _let_go(self) -> None:
        for stop in self._stop_waiting:
            stop()
        if self._directory is not None:
            self._directory.release()

    def _install(self) -> None:
        if self.settings.scope is Scope.MICRO and self._metrics is None:
            return  # Megatron as it is
        from megatron_global_lbl.hook import checkpoint, imports, recomputation, rerun, router, step, training_log, versions

        versions.say_preview()

        for hook in (router, recomputation, step, rerun):
            hook.install(self._patches, self._engine)
        # Megatron-Core can be used without the training loop, whose checkpoints carry the window (else see `state_dict`) and
        # whose log shows the metrics; and a script may import that loop after it has registered.
        if self.settings.scope is Scope.WINDOW:
            save = functools.partial(checkpoint.install, self._patches, self._engine)
            self._stop_waiting.append(imports.when_imported(checkpoint.CHECKPOINTING, save))
        if self._metrics is not None:
            show = functools.partial(training_log.install, self._patches, self._metrics)
            self._stop_waiting.append(imports.when_imported(training_log.TRAINING, show))

    @property
    def hooked(self) -> list[str]:
        return self._patches.paths

    @property
    def loss_paths(self) -> dict[str, str]:
        return self._engine.loss_paths

    def remove(self) -> None:
        """Put back every symbol of Megatron; doing it again changes nothing.

        Raises:
            RuntimeError: somebody else has replaced one of them since (the others are restored).
        """
        global _active
        if _active is self:
            _active = None
        self._let_go()
        try:
            self._engine.close()
        finally:
            self._patches.restore()

    def metrics(self) -> dict[str, float]:
        """The balance since the last call, as Megatron's log shows it, for a training loop of your own.

        A collective: call it on every rank, after a step's end.

        Returns:
            Numbers by key "moe-lbl/..." (docs/metrics.md), the same on every rank.

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
        self._engine.discard()

    def state_dict(self, model: Model | None = None) -> dict:
        """What must travel in a checkpoint of a loop of your own: plain numbers, and tensors on the CPU.

        It holds the MoE layers of this rank's pipeline stage: how many steps they completed, and in scope `window` the counts
        [steps, groups, experts + 1] int64. Megatron's own checkpoints carry it without this.

        Args:
            model: whose layers; a module or the list of its chunks. Needed where several models are trained.

        Raises:
            ConfigError: several models were met, and none is named.
        """
        return {"format": STATE_FORMAT, "layers": self._engine.state(_routers_of(model))}

    def load_state_dict(self, state: dict, model: Model | None = None) -> None:
        """Continue from `state_dict()`: what a layer needs is taken up at its first forward, or now if that was before.

        Args:
            state: of any number of layers; those of other pipeline stages are left alone.
            model: whose layers. Needed where several models are trained.

        Raises:
            ConfigError: several models were met, or one that is gone, and none is named; now or at the first forward, if the
                state belongs to other experts, another top-k or other groups.
        """
        if state.get("format") != STATE_FORMAT:
            raise ConfigError(f"state_dict of format {state.get('format')}: unknown; allowed: {STATE_FORMAT}")
        self._engine.load(state["layers"], _routers_of(model))


def _routers_of(model: Model | None) -> dict[str, Any] | None:
    if model is None:
        return None
    from megatron_global_lbl.hook.models import routers_of

    return routers_of(model)


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
    window_steps: int | None = None,
    micro_coeff: float = 0.0,
    start_iter: int = 0,
    group_size: int | None = None,
    sync: str | None = None,
    metrics: str | None = None,
    metrics_dir: str | None = None,
) -> Handle:
    """Replace the load-balancing loss of every `TopKRouter` in this process.

    Call it before the first training step, on every rank; models built before and after are both covered. The arguments are
    the flags `--moe-lbl-*` (docs/how-it-works.md) without their prefix. Registering twice with the same settings returns the
    handle that exists.

    Args:
        scope: "micro" (Megatron untouched), "dp", "global" or "window" (experimental).
        window_steps: optimizer steps that `window` counts over, >= 1; 1 if not given.
        micro_coeff: coefficient of a micro-batch LBL that is added.
        start_iter: `micro` before this 0-based iteration.
        group_size: data-parallel ranks per synchronisation group; all if not given.
        sync: "overlap" or "blocking".
        metrics: "brief", "detailed" or "off": what Megatron's log and `Handle.metrics` show of the balance; off if not given.
        metrics_dir: where the balance record is written.

    Raises:
        ConfigError: a value that is not allowed, or a registration with other settings exists.
        UnsupportedMegatron: no Megatron-Core, an unsupported release, or a symbol that is not where it should be.
    """
    global _active
    settings = Settings.create(
        scope=scope,
        window_steps=window_steps,
        micro_coeff=micro_coeff,
        start_iter=start_iter,
        group_size=group_size,
        sync=sync,
        metrics=metrics,
        metrics_dir=metrics_dir,
    )
    if _active is not None:
        if _active.settings != settings:
            raise ConfigError(f"registered already with other settings: {_active.settings}; remove that handle first")
        return _active
    _active = Handle(settings)
    return _active


@contextmanager
def registered(**settings) -> Iterator[Handle]:
    """`register` for the time of a `with` block; undone on exit, exceptions included, unless it was registered before."""
    was_registered = _active is not None
    handle = register(**settings)
    try:
        yield handle
    finally:
        if not was_registered:
            handle.remove()


def end_step(model: Model | None = None) -> None:
    """The optimizer step's backward passes are over: for a training loop that does not call Megatron's
    `finalize_model_grads`, which says so by itself. Call it on every rank, before the next forward; without a registration,
    or twice in a row, it does nothing.

    Args:
        model: whose step; a module or the list of its chunks. None: of every model that ran since its last step's end.

    Raises:
        ConfigError: a forward that was counted has had no backward.
    """
    if _active is not None:
        routers = _routers_of(model)
        _active._engine.end_step(None if routers is None else routers.values())
