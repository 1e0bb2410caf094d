"""Says what the Megatron-Core of this environment is and where the hook attaches."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 if the plugin can work here, 1 if not."""
    from megatron_global_lbl.hook.versions import UnsupportedMegatron, installed_version, require_supported

    try:
        require_supported()
    except UnsupportedMegatron as error:
        print(error)
        return 1
    print(f"Megatron-Core {installed_version()}: supported")
    return 0
