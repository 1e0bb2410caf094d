"""For ms-swift: one callback, which only scope `window` and `start_iter` need.

    import megatron_global_lbl.frameworks.swift  # in the file of --external_plugins, with --callbacks moe_lbl
    megatron_global_lbl.register(scope="window")

It carries through ms-swift's checkpoints what outlives a step: the window, and the completed steps that `start_iter` counts.
That is one file more in a checkpoint's folder; a checkpoint without it starts both anew, which is said.
"""

from __future__ import annotations

from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map

from megatron_global_lbl.frameworks import beside
from megatron_global_lbl.registry import active
from megatron_global_lbl.settings import ConfigError

NAME = "moe_lbl"


class LoadBalancing(MegatronCallback):
    """The plugin's state in the checkpoints of ms-swift's Megatron trainers (4.6): `--callbacks moe_lbl`."""

    def __init__(self, trainer) -> None:
        """
        Args:
            trainer: ms-swift's.

        Raises:
            ConfigError: nothing is registered.
        """
        super().__init__(trainer)
        handle = active()
        if handle is None:
            raise ConfigError(f"--callbacks {NAME} needs megatron_global_lbl.register(...) in a file of --external_plugins")
        self.handle = handle

    def on_train_begin(self) -> None:
        """After a checkpoint was loaded; with `--finetune true` its iteration is 0, and there is nothing to continue."""
        args = self.args
        folder = args.mcore_adapter or args.mcore_model or (args.adapters or [args.model])[0]
        if self.state.iteration != 0 and folder is not None:
            beside.load(self.handle, self.trainer.wrapped_models, folder)

    def on_save(self, output_dir) -> None:
        """After a checkpoint was written or, with `--async_save`, begun; every rank gets here, in the step that is saved."""
        beside.save(self.handle, self.trainer.wrapped_models, output_dir)


megatron_callbacks_map[NAME] = LoadBalancing
