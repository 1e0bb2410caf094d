"""What a training shows of its balance. Reads what the core counts, changes nothing.

The record is read without PyTorch and without Megatron (NumPy only): `from megatron_global_lbl.metrics import read`.
"""

from megatron_global_lbl.metrics.record import METRICS, RecordError, Run, read

__all__ = ["METRICS", "RecordError", "Run", "read"]
