"""For Megatron Bridge: one callback.

    from megatron_global_lbl.frameworks.bridge import LoadBalancing
    pretrain(config, forward_step, callbacks=[LoadBalancing(scope="global")])

It registers at once, and carries through Bridge's checkpoints what outlives a step: the window, and the completed steps that
`start_iter` counts. That is one file more in a checkpoint's folder; a checkpoint without it starts both anew, which is said.
"""

from __future__ import annotations

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.utils.checkpoint_utils import get_checkpoint_name

import megatron_global_lbl as lbl
from megatron_global_lbl.frameworks import beside
from megatron_global_lbl.settings import Scope


class LoadBalancing(Callback):
    """The plugin in Megatron Bridge's `pretrain` and `finetune` (0.6).

    Attributes:
        handle: of the registration; `handle.remove()` undoes it.
    """

    def __init__(self, **settings) -> None:
        """
        Args:
            settings: those of `megatron_global_lbl.register`.

        Raises:
            ConfigError, UnsupportedMegatron: as `register`.
        """
        self.handle = lbl.register(**settings)

    @property
    def _outlives_a_step(self) -> bool:
        return self.handle.settings.scope is Scope.WINDOW or self.handle.settings.start_iter > 0

    def on_train_start(self, context: CallbackContext) -> None:
        """After a checkpoint was loaded.

        Raises:
            ConfigError: what has to be saved would be of a later step than an asynchronous checkpoint.
        """
        checkpoint, step = context.state.cfg.checkpoint, context.state.train_state.step
        if not self._outlives_a_step:
            return
        if checkpoint.save and checkpoint.async_save:
            raise lbl.ConfigError(
                "checkpoint.async_save with scope window or start_iter: the callback runs when the checkpoint is finished, "
                "which is steps later; allowed: async_save=False"
            )
        if step == 0 or not checkpoint.load:
            return
        beside.load(self.handle, context.model, get_checkpoint_name(checkpoint.load, step))

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """After a checkpoint was written; every rank gets here."""
        if self._outlives_a_step:
            folder = get_checkpoint_name(context.state.cfg.checkpoint.save, context.state.train_state.step)
            beside.save(self.handle, context.model, folder)
