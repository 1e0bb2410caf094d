"""What is wrong with upstream's `global_aux_loss`: one table for `megatron-lbl doctor`, docs/upstream.md and the scripts in
`benchmarks/upstream`, which show each on the installed Megatron-Core. Imports nothing of Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

GLOBAL_AUX_LOSS_SINCE = "0.15"
PADDING_MASKS_SINCE = "0.16"
"""Routers of releases before it know no padding."""

MEASURED = ("0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""The releases on which the scripts ran: `since` and `until` are about these (benchmarks/upstream/2026-11-22.md)."""


@dataclass(frozen=True)
class Defect:
    """One defect.

    Attributes:
        id: D1 to D9.
        text: what a user gets, in one line.
        script: the file in `benchmarks/upstream` that shows it.
        threads: issues and pull requests of NVIDIA/Megatron-LM, or OWNER/REPOSITORY#NUMBER elsewhere.
        since: the first release of Megatron-Core that has it, MAJOR.MINOR.
        until: the first release without it again; None while no release has mended it.
    """

    id: str
    text: str
    script: str
    threads: tuple[str, ...] = ()
    since: str = GLOBAL_AUX_LOSS_SINCE
    until: str | None = None

    @property
    def span(self) -> str:
        """The releases that have it, in words."""
        return f"since {self.since}" + ("" if self.until is None else f", before {self.until}")

    def is_in(self, release: tuple[int, int]) -> bool:
        """Whether this release, (major, minor), has it."""
        return as_release(self.since) <= release and (self.until is None or release < as_release(self.until))


def as_release(text: str) -> tuple[int, int]:
    """(0, 15) of "0.15"."""
    major, minor = text.split(".")
    return int(major), int(minor)


DEFECTS = (
    Defect(
        "D1",
        "counters are rounded to bf16 in a bf16 model: f drifts, and from 256 micro-batches on no longer sums to 1",
        "d1_rounded_counters.py",
        ("#7081",),
    ),
    Defect(
        "D2",
        "the gradient is too weak by the data-parallel size, and the log does not show it",
        "d2_strength.py",
        ("#3672", "#3768", "#3769", "#5007"),
    ),
    Defect(
        "D3",
        "with uneven tokens per micro-batch or rank, f does not sum to 1",
        "d3_uneven_tokens.py",
        ("#7213", "#7214"),
    ),
    Defect(
        "D4",
        "with a padding mask a rank takes the whole group's tokens for its own",
        "d4_token_count.py",
        ("#7481",),
        since=PADDING_MASKS_SINCE,
    ),
    Defect(
        "D5",
        "the strength depends on --calculate-per-token-loss, TP, CP and padding, not on the coefficient alone",
        "d5_strength_by_flags.py",
        ("#1652", "#5047"),
    ),
    Defect(
        "D6",
        "f counts a plain top-k of the scores, not the experts selected with expert bias or group limits",
        "d6_selection.py",
        ("#2767", "#5195"),
    ),
    Defect(
        "D7",
        "every MoE layer of every micro-batch waits for an all-reduce in the forward, though f is needed in the backward",
        "d7_blocking_collectives.py",
    ),
    Defect(
        "D8",
        "the log shows a load_balancing_loss of 0 that does not exist, and no balance of the whole global batch",
        "d8_logging.py",
        ("#1494", "#7172"),
    ),
    Defect(
        "D9",
        "with a padding mask the fused loss kernel gets a floating-point token count; newer ones want an integer",
        "d9_fused_count_dtype.py",
        ("NVIDIA/TransformerEngine#2898",),
        since=PADDING_MASKS_SINCE,
    ),
)
"""All of them, by id."""
