"""Hooks checkpointed calls, so that each knows what its first run counted (core/recompute.py).

    CheckpointFunction.apply    of Megatron (`tensor_parallel.checkpoint` calls it by this name in every release)
    _CheckpointFunction.apply   of Transformer Engine (`te_checkpoint`: fp8 and fp4), where it is installed

`apply`, because it is called before autograd turns recording off: under `torch.no_grad()` nothing will be recomputed.
"""

from __future__ import annotations

import sys

from megatron_global_lbl.core.recompute import Recompute
from megatron_global_lbl.hook.patching import Patches

MEGATRON = "megatron.core.tensor_parallel.random"
TRANSFORMER_ENGINE = "transformer_engine.pytorch.distributed"


def install(patches: Patches, recompute: Recompute) -> None:
    """Let every checkpointed call keep what its first run counted."""

    def wrap(original):
        def apply(function, *arguments, **kwargs):
            return original(recompute.bind(function, arguments), *arguments, **kwargs)

        return apply

    patches.wrap(MEGATRON, "CheckpointFunction.apply", wrap, inherited=True)
    # Megatron has imported it by now if it is there.
    if hasattr(sys.modules.get(TRANSFORMER_ENGINE), "_CheckpointFunction"):
        patches.wrap(TRANSFORMER_ENGINE, "_CheckpointFunction.apply", wrap, inherited=True)
