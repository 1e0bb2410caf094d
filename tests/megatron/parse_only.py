"""Parse and validate command lines as Megatron does at the start of a training, without training: JSON in, JSON out.

stdin: {name: {"world": processes, "argv": [script, flags ...]}}. stdout, last line: {name: {argument: value}}.
"""

from __future__ import annotations

import json
import os
import sys

import megatron_cpu

megatron_cpu.install()
from megatron_global_lbl import flags, registry  # noqa: E402
from megatron_global_lbl.hook import arguments as hooked  # noqa: E402

hooked.install(flags.add_arguments, flags.activate)
from megatron.training import arguments  # noqa: E402

result = {}
for name, case in json.load(sys.stdin).items():
    os.environ.update(RANK="0", WORLD_SIZE=str(case["world"]))
    sys.argv = case["argv"]
    args = arguments.parse_args()  # exits at an unknown flag or a bad value
    arguments.validate_args(args)
    if (handle := registry.active()) is not None:  # the next has settings of its own
        handle.remove()
    result[name] = {key: value for key, value in vars(args).items() if isinstance(value, int | float | str | list)}
print(json.dumps(result))
