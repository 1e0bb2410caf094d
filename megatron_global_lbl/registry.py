"""The public verbs: `register`, `registered`, `end_step`, and the handle that undoes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_global_lbl.settings import ConfigError, Scope, Settings

_active: Handle | None = None


class Handle:
    """One registration.

    Attributes:
        settings: what was registered, defaults filled in.
        hooked: dotted paths of the Megatron symbols that are replaced.
        takeover_is_said: the user knows what taking over `global_aux_loss` changes; else the first rank of a stage says it.
    """

    def __init__(self, settings: Settings) -> None:
        # Here, because the flags and `megatron-lbl patch` must work without PyTorch.
        from megatron_global_lbl.engine import Engine
        from megatron_global_lbl.hook.patching import Patches
        from megatron_global_lbl.hook.versions import require_supported

        require_supported()
        self.settings = settings
        self._engine = Engine(settings)
        self._patches = Patches()
        try:
            self._install()
        except BaseException:
            self._patches.restore()
            raise

    def _install(self) -> None:
        if self.settings.scope is Scope.MICRO and self.settings.metrics_dir is None:
            return  # Megatron as it is
        from megatron_global_lbl.hook import checkpoint, rerun, router, step

        router.install(self._patches, self._engine)
        step.install(self._patches, self._engine)
        if self._engine.window is not None:
            rerun.install(self._patches, self._engine)
            # Megatron-Core can be used without the training loop whose checkpoints carry the window; see `state_dict`.
            if "megatron.training" in sys.modules:
                checkpoint.install(self._patches, self._engine)

    @property
    def hooked(self) -> list[str]:
        return self._patches.paths

    @property
    def takeover_is_said(self) -> bool:
        return self._engine.takeover_is_said

    @takeover_is_said.setter
    def takeover_is_said(self, value: bool) -> None:
        self._engine.takeover_is_said = value

    def remove(self) -> None:
        """Put back every symbol of Megatron; doing it again changes nothing.

        Raises:
            RuntimeError: somebody else has replaced one of them since (the others are restored).
        """
        global _active
        if _active is self:
            _active = None
        try:
            self._engine.close()
        finally:
            self._patches.restore()

    def state_dict(self) -> dict:
        """What must travel in a checkpoint of a loop of your own; empty except for scope `window`.

        Plain tensors on the CPU, [steps, groups, experts + 1] int64 per MoE layer of this rank's pipeline stage. Megatron's
        own checkpoints carry it without this.
        """
        return {"window": self._engine.window.state()} if self._engine.window is not None else {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`; before or after the model was built.

        Raises:
            ValueError: it belongs to a model with other experts or to other groups.
        """
        if self._engine.window is not None and "window" in state:
            self._engine.window.load(state["window"])


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
    metrics_dir: str | None = None,
) -> Handle:
    """Replace the load-balancing loss of every `TopKRouter` in this process.

    Call it before the first training step, on every rank; models built before and after are both covered. The arguments are
    the flags `--moe-lbl-*` (docs/how-it-works.md) without their prefix. Registering twice with the same settings returns the
    handle that exists.

    Args:
        scope: "micro" (Megatron untouched), "dp", "global" or "window".
        window_steps: optimizer steps that `window` counts over, >= 1; 16 if not given.
        micro_coeff: coefficient of a micro-batch LBL that is added.
        start_iter: `micro` before this 0-based iteration.
        group_size: data-parallel ranks per synchronisation group; all if not given.
        sync: "overlap" or "blocking".
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


def end_step() -> None:
    """The optimizer step's backward passes are over: for a training loop that does not call Megatron's
    `finalize_model_grads`, which says so by itself. Call it on every rank, before the next forward; without a registration,
    or twice in a row, it does nothing."""
    if _active is not None:
        from megatron_global_lbl.hook.step import current_iteration

        _active._engine.end_step(current_iteration())
