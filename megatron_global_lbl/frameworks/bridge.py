"""For Megatron Bridge: one callback, which registers and gives the iteration.

from megatron_global_lbl.frameworks.bridge import LoadBalancing
pretrain(config, forward_step, callbacks=[LoadBalancing(scope="global")])
"""

from __future__ import annotations

from megatron.bridge.training.callbacks import Callback, CallbackContext

import megatron_global_lbl as lbl


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
        self._context: CallbackContext | None = None
        self.handle = lbl.register(iteration=self._iteration, **settings)

    def _iteration(self) -> int:
        return 0 if self._context is None else self._context.state.train_state.step

    def on_train_start(self, context: CallbackContext) -> None:
        """After a checkpoint was loaded."""
        self._context = context
