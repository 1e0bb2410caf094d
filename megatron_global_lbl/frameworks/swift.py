"""For ms-swift (4.6): one callback, which gives the iteration (for `start_iter` and the record).

import megatron_global_lbl.frameworks.swift as swift  # in the file of --external_plugins, with --callbacks moe_lbl
megatron_global_lbl.register(scope="global", metrics_dir="balance", iteration=swift.iteration)
"""

from __future__ import annotations

from typing import Any

from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map

from megatron_global_lbl.registry import active
from megatron_global_lbl.settings import ConfigError

_state: Any = None


def iteration() -> int:
    """0-based, of the trainer; 0 before it starts."""
    return 0 if _state is None else _state.iteration


class LoadBalancing(MegatronCallback):
    """`--callbacks moe_lbl` of ms-swift's Megatron trainers."""

    def on_train_begin(self) -> None:
        """After a checkpoint was loaded.

        Raises:
            ConfigError: nothing is registered.
        """
        global _state
        if active() is None:
            raise ConfigError("--callbacks moe_lbl needs megatron_global_lbl.register(...) in a file of --external_plugins")
        _state = self.state


megatron_callbacks_map["moe_lbl"] = LoadBalancing
