"""MoE load-balancing loss for Megatron-Core with expert frequencies counted over the whole global batch.

Importing this package patches nothing; `register` (or the flag `--moe-lbl-scope` through the launcher) does.
Read `balance.py` first: the main idea is there.
"""

from megatron_global_lbl.hook.versions import UnsupportedMegatron
from megatron_global_lbl.loss import load_balancing_loss
from megatron_global_lbl.registry import Handle, end_step, register, registered
from megatron_global_lbl.settings import ConfigError, Scope

__version__ = "0.1.0"
__all__ = ["ConfigError", "Handle", "Scope", "UnsupportedMegatron", "end_step", "load_balancing_loss", "register", "registered"]
