"""What a patched `megatron/training/arguments.py` has more than the release's, and after which lines: all that a patch is.

`megatron-lbl patch` inserts it and takes it out; `scripts/make_patches.py` writes the same as patches/*.patch, for other tools.
"""

from __future__ import annotations

# Everything that may change with the plugin is behind the two calls, so that an upgrade of it needs no new patch. Without the
# plugin the command line is searched, not only declared: argparse would ignore the flags where a script parses known ones.
ARGUMENTS = b"""\
    try:  # plugin megatron_global_lbl: --moe-lbl-*
        from megatron_global_lbl.flags import add_arguments as add_moe_lbl_args
    except ImportError as error:
        import sys
        given = [arg for arg in sys.argv if arg.startswith('--moe-lbl-')]
        if given:
            raise SystemExit(f'error: {given[0]} needs the plugin megatron_global_lbl ({error}): '
                             'pip install it from its source tree into this environment')
    else:
        parser = add_moe_lbl_args(parser)
"""
VALIDATED = b"""\
    if hasattr(args, 'moe_lbl_scope'):
        from megatron_global_lbl.flags import activate as activate_moe_lbl
        activate_moe_lbl(args)
"""


class DoesNotFit(Exception):
    """The lines cannot be inserted into this file, or removed from it."""


def insertions(release: tuple[int, int]) -> tuple[tuple[bytes, bytes], ...]:
    """Lines of a release, (major, minor), and the text that goes between each and the empty line that follows it.

    Always an empty one: so a patch's lines of context hold one line of Megatron-LM each.
    """
    last = b"fault_injector" if release >= (0, 18) else b"sft"
    parser, validated = b"    parser = _add_" + last + b"_args(parser)\n", b'    _print_args("arguments", args)\n'
    return (parser, ARGUMENTS), (validated, VALIDATED)


def fits(content: bytes, release: tuple[int, int]) -> bool:
    """Whether the file has each place exactly once."""
    return all(content.count(b"\n" + after + b"\n") == 1 for after, _ in insertions(release))


def insert(content: bytes, release: tuple[int, int]) -> bytes:
    """The file with all insertions; DoesNotFit if a place is not there exactly once."""
    if not fits(content, release):
        raise DoesNotFit("a line to insert something after is not there exactly once, before an empty line")
    for after, text in insertions(release):
        content = content.replace(b"\n" + after + b"\n", b"\n" + after + text + b"\n")
    return content


def remove(content: bytes, release: tuple[int, int]) -> bytes:
    """The file without the insertions; DoesNotFit if one is not there exactly once."""
    for after, text in insertions(release):
        if content.count(after + text) != 1:
            raise DoesNotFit("what was inserted is not there exactly once")
        content = content.replace(after + text, after)
    return content
