"""`python without_plugin.py SCRIPT ARGS`: Megatron in CPU mode, with nothing else of this project."""

import runpy
import sys
from pathlib import Path

from megatron_global_lbl import cpu

cpu.install()
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
