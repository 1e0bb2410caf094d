"""`python without_plugin.py SCRIPT ARGS`: Megatron in CPU mode, without the plugin."""

import runpy
import sys
from pathlib import Path

import megatron_cpu

megatron_cpu.install()
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
