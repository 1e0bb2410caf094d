"""What the user chose: the scope of f and its companions, checked as far as it can be without a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

DEFAULT_WINDOW_STEPS = 1


class ConfigError(ValueError):
    """A setting that cannot work; the message names the flag, the value and what is allowed."""


class Scope(str, Enum):
    """The balance batch of a micro-batch: the tokens over which f is counted."""

    MICRO = "micro"
    """This micro-batch on this data-parallel rank: Megatron's own `aux_loss`, left untouched."""
    DP = "dp"
    """This micro-batch on all data-parallel ranks (the paper's synchronisation)."""
    GLOBAL = "global"
    """All data-parallel ranks and the step's micro-batches (the paper's synchronisation + buffer)."""
    WINDOW = "window"
    """All data-parallel ranks and the last completed optimizer steps. Experimental (docs/balancing.md)."""


class Sync(str, Enum):
    """How the forward treats the reduction of its counts."""

    OVERLAP = "overlap"
    """Start it and return; the backward waits for it."""
    BLOCKING = "blocking"
    """Wait for it on the spot: the plain reference, with the same bits."""


class Detail(str, Enum):
    """What Megatron's log shows of the balance, once per log interval."""

    BRIEF = "brief"
    """Mean and worst layer of a few measures."""
    DETAILED = "detailed"
    """More measures, their median and 90th percentile over layers, and the router's uncertainty (passes over [T, E])."""
    OFF = "off"
    """Nothing."""


@dataclass(frozen=True)
class Settings:
    """The flags `--moe-lbl-*` without their prefix. `None` stands for a flag that was not given."""

    scope: Scope
    window_steps: int | None = None
    micro_coeff: float = 0.0
    start_iter: int = 0
    group_size: int | None = None
    sync: Sync | None = None
    metrics: Detail | None = None
    metrics_dir: str | None = None

    @staticmethod
    def create(**values: object) -> Settings:
        """Settings from raw values of any type, with defaults filled in.

        Raises:
            ConfigError: a value that is not allowed, or that the scope would silently ignore.
        """
        settings = Settings(
            scope=_member(Scope, "scope", values.get("scope")),
            window_steps=_number("window_steps", values.get("window_steps"), int, least=1, none=True),
            micro_coeff=_number("micro_coeff", values.get("micro_coeff", 0.0), float, least=0.0),
            start_iter=_number("start_iter", values.get("start_iter", 0), int, least=0),
            group_size=_number("group_size", values.get("group_size"), int, least=1, none=True),
            sync=None if values.get("sync") is None else _member(Sync, "sync", values["sync"]),
            metrics=None if values.get("metrics") is None else _member(Detail, "metrics", values["metrics"]),
            metrics_dir=_text("metrics_dir", values.get("metrics_dir")),
        )
        settings._refuse_what_would_be_ignored()
        if settings.scope is Scope.WINDOW and settings.window_steps is None:
            settings = replace(settings, window_steps=DEFAULT_WINDOW_STEPS)
        if settings.scope is not Scope.MICRO and settings.sync is None:
            settings = replace(settings, sync=Sync.OVERLAP)
        return settings

    @property
    def shows_metrics(self) -> bool:
        """Whether the balance is in Megatron's log. Unlike the flag, `register` does not show it unless it is asked to."""
        return self.metrics not in (None, Detail.OFF)

    @property
    def observes(self) -> bool:
        """Whether anything looks on, be it in scope `micro`."""
        return self.shows_metrics or self.metrics_dir is not None

    def require_group_size_fits(self, data_parallel_size: int) -> None:
        """
        Raises:
            ConfigError: groups of `--moe-lbl-group-size` do not fill the data-parallel ranks.
        """
        if self.group_size is not None and data_parallel_size % self.group_size:
            raise ConfigError(
                f"{flag('group_size')} {self.group_size}: not allowed; allowed: a divisor of the data-parallel size "
                f"{data_parallel_size}"
            )

    def _refuse_what_would_be_ignored(self) -> None:
        if self.window_steps is not None and self.scope is not Scope.WINDOW:
            raise ConfigError(
                f"{flag('window_steps')} {self.window_steps} has no effect with {flag('scope')} {self.scope.value}; "
                f"allowed: with {flag('scope')} window"
            )
        if self.scope is Scope.MICRO:
            for name in ("micro_coeff", "start_iter", "group_size", "sync"):
                value = getattr(self, name)
                if value:
                    value = value.value if isinstance(value, Enum) else value
                    raise ConfigError(
                        f"{flag(name)} {value} has no effect with {flag('scope')} micro (Megatron's own loss); "
                        f"allowed: with {flag('scope')} dp, global or window"
                    )


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--moe-lbl-" + name.replace("_", "-")


def _member(kind: type[Enum], name: str, value: object):
    allowed = ", ".join(member.value for member in kind)
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{flag(name)} {value}: unknown; allowed: {allowed}") from None


def _number(name: str, value: object, kind: type, *, least: float, none: bool = False):
    if value is None and none:
        return None
    word = "an integer" if kind is int else "a number"
    error = ConfigError(f"{flag(name)} {value}: not allowed; allowed: {word} >= {least}")
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise error
    try:
        number = kind(value)
    except (TypeError, ValueError):
        raise error from None
    if not least <= number < float("inf"):
        raise error
    return number


def _text(name: str, value: object) -> str | None:
    if value is None:
        return None
    text = str(value)
    if not text:
        raise ConfigError(f"{flag(name)} is empty; allowed: the path of a directory")
    return text
