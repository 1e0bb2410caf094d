"""What the user chose: the scope of f and its companions, checked as far as it can be without a model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

MOST_COEFF = 1.0
"""The loss is about 1 when the load is even: a larger coefficient makes it outweigh the model's own loss."""


VARIABLE = "MEGATRON_GLOBAL_LBL"
"""The environment variable that registers (startup.py)."""


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


_COUNTED = {
    Scope.MICRO: "Megatron's own loss will be left untouched",
    Scope.DP: "f will be counted over the micro-batch on all data-parallel ranks",
    Scope.GLOBAL: "f will be counted over the global batch on all data-parallel ranks",
}


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
    micro_coeff: float = 0.0
    start_iter: int = 0
    group_size: int | None = None
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
            micro_coeff=_number("micro_coeff", values.get("micro_coeff", 0.0), float, least=0.0, most=MOST_COEFF),
            start_iter=_number("start_iter", values.get("start_iter", 0), int, least=0),
            group_size=_number("group_size", values.get("group_size"), int, least=1, none=True),
            metrics=None if values.get("metrics") is None else _member(Detail, "metrics", values["metrics"]),
            metrics_dir=_text("metrics_dir", values.get("metrics_dir")),
        )
        settings._refuse_what_would_be_ignored()
        return settings

    @property
    def shows_metrics(self) -> bool:
        """Whether the balance is in Megatron's log. Unlike the flag, `register` does not show it unless it is asked to."""
        return self.metrics not in (None, Detail.OFF)

    @property
    def observes(self) -> bool:
        """True if metrics are recorded, in any scope."""
        return self.shows_metrics or self.metrics_dir is not None

    def in_words(self) -> list[str]:
        """What will be done; what was done is measured."""
        groups = f", in groups of {self.group_size}" if self.group_size else ""
        lines = [f"scope {self.scope.value}; {_COUNTED[self.scope]}{groups}"]
        if self.start_iter:
            lines.append(f"scope micro before iteration {self.start_iter}")
        if self.micro_coeff:
            lines.append(f"a micro-batch loss will be added with coefficient {self.micro_coeff:g}")
        if self.metrics_dir:
            lines.append(f"the balance record will be written to {self.metrics_dir}")
        return lines

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
        if self.scope is Scope.MICRO:
            for name in ("micro_coeff", "start_iter", "group_size"):
                if value := getattr(self, name):
                    raise ConfigError(
                        f"{flag(name)} {value} has no effect with {flag('scope')} micro (Megatron's own loss); "
                        f"allowed: with {flag('scope')} dp or global"
                    )


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--moe-lbl-" + name.replace("_", "-")


def did_you_mean(word: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """A near miss, as the end of an error message; empty if nothing is near."""
    near = difflib.get_close_matches(word.lower(), list(allowed), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def _member(kind: type[Enum], name: str, value: object):
    allowed = [member.value for member in kind]
    try:
        return kind(value)
    except ValueError:
        hint = did_you_mean(str(value), allowed)
        raise ConfigError(f"{flag(name)} {value}: unknown; allowed: {', '.join(allowed)}{hint}") from None


def _number(name: str, value: object, kind: type, *, least: float, most: float = math.inf, none: bool = False):
    if value is None and none:
        return None
    word = "an integer" if kind is int else "a number"
    span = f">= {least}" if most == math.inf else f"from {least:g} to {most:g}"
    error = ConfigError(f"{flag(name)} {value}: not allowed; allowed: {word} {span}")
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise error
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise error from None
    if not least <= number <= most or number == math.inf:
        raise error
    return number


def _text(name: str, value: object) -> str | None:
    if value is None:
        return None
    text = str(value)
    if not text:
        raise ConfigError(f"{flag(name)} is empty; allowed: the path of a directory")
    return text
