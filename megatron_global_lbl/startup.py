"""MEGATRON_GLOBAL_LBL="scope=global metrics_dir=DIR" in the environment registers in every process with Megatron's router.

The file megatron_global_lbl.pth beside the installed package calls `watch` at the start of every Python with the variable; so
does the launcher. What a process asks for itself, by `register` or a flag, wins over the variable.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_global_lbl.hook.imports import when_imported
from megatron_global_lbl.settings import VARIABLE

if TYPE_CHECKING:
    from megatron_global_lbl.registry import Handle
    from megatron_global_lbl.settings import Settings

ROUTER = "megatron.core.transformer.moe.router"

_stop: Callable[[], None] | None = None
_handle: Handle | None = None


def watch() -> None:
    """Register once Megatron-Core's router is imported, if the variable is set. Idempotent."""
    global _stop
    if _stop is None and os.environ.get(VARIABLE):
        from megatron_global_lbl import registry

        registry.ask_first = give_way
        _stop = when_imported(ROUTER, _register)


def is_watching() -> bool:
    return _stop is not None


def parse(text: str) -> Settings:
    """
    Raises:
        ConfigError: with the variable, the key and the value.
    """
    from megatron_global_lbl.settings import ConfigError, Settings, did_you_mean

    given, keys = f"{VARIABLE}={shlex.quote(text)}", list(Settings.__dataclass_fields__)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{given}: {error}; put quotes around a value with spaces, and close them") from None
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f'{given}: {word}: not KEY=VALUE; write {VARIABLE}="scope=global metrics_dir=DIR"')
        if key not in keys:
            raise ConfigError(f"{given}: {key}={value}: unknown key; allowed: {', '.join(keys)}{did_you_mean(key, keys)}")
        if key in values:
            raise ConfigError(f"{given}: {key}={value}: given twice; remove one")
        values[key] = value
    try:
        return Settings.create(**{"scope": "micro", **values})
    except ConfigError as error:
        raise ConfigError(f"{given}: {_in_notation(str(error))}") from None


def _in_notation(error: str) -> str:
    """ "--moe-lbl-start-iter -1: not allowed" as one about start_iter=-1."""
    return re.sub(r"--moe-lbl-([a-z-]+)( is |\b) ?", lambda m: m[1].replace("-", "_") + (m[2] or "="), error)


def _register() -> None:
    """
    Raises:
        ConfigError: also for an unsupported Megatron. It would be an ImportError, which frameworks catch around their imports.
    """
    global _handle
    import multiprocessing

    from megatron_global_lbl import registry
    from megatron_global_lbl.hook.versions import UnsupportedMegatron
    from megatron_global_lbl.settings import ConfigError

    text = os.environ.get(VARIABLE, "")
    settings = parse(text)
    try:
        _handle = registry.register_settings(settings, by_environment=True)
    except (ConfigError, UnsupportedMegatron) as error:
        raise ConfigError(f"{VARIABLE}={shlex.quote(text)}: {_in_notation(str(error))}") from None
    if multiprocessing.parent_process() is None and registry.is_first_rank():
        print("\n".join(f"> moe-lbl: {line} ({VARIABLE})" for line in settings.in_words()), flush=True)


def stop() -> None:
    """End the waiting; a registration that was made stays."""
    global _stop, _handle
    if _stop is not None:
        _stop()
    _stop = _handle = None


def give_way(settings: Settings) -> None:
    """`register` or a flag asks for `settings`: the variable's registration ends, with a line if it was for others."""
    if _stop is None:
        return
    from megatron_global_lbl import registry
    from megatron_global_lbl.settings import ConfigError

    if _handle is not None and _handle is registry.active():
        if _handle.settings == settings or _handle.has_acted:
            return  # the same; or too late for others, which `register` refuses
        _handle.remove()
    stop()
    text = os.environ.get(VARIABLE, "")
    try:
        asked = parse(text)
        defaults = {name: field.default for name, field in asked.__dataclass_fields__.items()}
        agrees = all(getattr(asked, name) in (default, getattr(settings, name)) for name, default in defaults.items())
    except ConfigError:
        agrees = False
    if not agrees and registry.is_first_rank():
        print(f"> moe-lbl: {VARIABLE}={shlex.quote(text)} has no effect: `register` or a flag --moe-lbl-* is given", flush=True)
