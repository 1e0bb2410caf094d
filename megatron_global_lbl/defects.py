"""What is wrong with upstream's `global_aux_loss`: one table for `megatron-lbl doctor`, docs/upstream.md and the scripts in
`benchmarks/upstream`, which show each on the installed Megatron-Core. Imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """One defect.

    Attributes:
        id: D1 to D9.
        text: what a user gets, in one line.
        script: the file in `benchmarks/upstream` that shows it.
        threads: issues and pull requests of NVIDIA/Megatron-LM, or OWNER/REPOSITORY#NUMBER elsewhere.
    """

    id: str
    text: str
    script: str
    threads: tuple[str, ...] = ()


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
    ),
)
"""All of them, by id."""


def takeover_notice(data_parallel_size: int) -> str:
    """What must be said when a scope takes over upstream's `global_aux_loss` (docs/upstream.md, D2)."""
    dp = data_parallel_size
    return (
        f"!! Megatron's global_aux_loss is taken over: its gradient is {dp} (the data-parallel size) times too weak, so "
        f"the strength rises by a factor of {dp}. To keep the former strength divide --moe-aux-loss-coeff by {dp}."
    )
