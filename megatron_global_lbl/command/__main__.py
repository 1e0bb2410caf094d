"""`python -m megatron_global_lbl.command`, for a clone on PYTHONPATH: the command `megatron-lbl`."""

from megatron_global_lbl.command import main

raise SystemExit(main())
