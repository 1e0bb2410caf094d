"""What is wrong with upstream's `global_aux_loss`: one table for `megatron-lbl doctor`, docs/upstream.md and the scripts in
`benchmarks/upstream`, which show each on the installed Megatron-Core. Imports nothing of Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GLOBAL_AUX_LOSS_SINCE = "0.15"
MEASURED = ("0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""The releases on which the scripts ran: `since` and `until` are about these (benchmarks/upstream/2026-11-22.md)."""


@dataclass(frozen=True)
class Defect:
    """One defect, D1 to D9.

    Attributes:
        text: what a user gets, in one line.
        script: the file in `benchmarks/upstream` that shows it.
        threads: issues and pull requests of NVIDIA/Megatron-LM, or OWNER/REPOSITORY#NUMBER elsewhere.
        since: the first release of Megatron-Core that has it; `until`: the first without it again, None while there is none.
    """

    id: str
    text: str
    script: str
    threads: tuple[str, ...] = ()
    since: str = GLOBAL_AUX_LOSS_SINCE
    until: str | None = None

    @property
    def span(self) -> str:
        return f"since {self.since}" + ("" if self.until is None else f", before {self.until}")

    def is_in(self, release: tuple[int, int]) -> bool:
        return as_release(self.since) <= release and (self.until is None or release < as_release(self.until))


def as_release(text: str) -> tuple[int, int]:
    """(0, 15) of "0.15"."""
    major, minor = text.split(".")
    return int(major), int(minor)


_TABLE = """\
D1 0.15 d1_rounded_counters.py #7081
counters are rounded to bf16 in a bf16 model: f drifts, and from 256 micro-batches on no longer sums to 1
D2 0.15 d2_strength.py #3672 #3768 #3769 #5007
the gradient is too weak by the data-parallel size, and the log does not show it
D3 0.15 d3_uneven_tokens.py #7213 #7214
with uneven tokens per micro-batch or rank, f does not sum to 1
D4 0.16 d4_token_count.py #7481
with a padding mask a rank takes the whole group's tokens for its own
D5 0.15 d5_strength_by_flags.py #1652 #5047
the strength depends on --calculate-per-token-loss, TP, CP and padding, not on the coefficient alone
D6 0.15 d6_selection.py #2767 #5195
f counts a plain top-k of the scores, not the experts selected with expert bias or group limits
D7 0.15 d7_blocking_collectives.py
every MoE layer of every micro-batch waits for an all-reduce in the forward, though f is needed in the backward
D8 0.15 d8_logging.py #1494 #7172
the log shows a load_balancing_loss of 0 that does not exist, and no balance of the whole global batch
D9 0.16 d9_fused_count_dtype.py NVIDIA/TransformerEngine#2898
with a padding mask the fused loss kernel gets a floating-point token count; newer ones want an integer
"""
"""Two lines each: id, first release, script and threads; then the text."""


def _read_table() -> Iterator[Defect]:
    lines = _TABLE.splitlines()
    for facts, text in zip(lines[::2], lines[1::2]):
        id, since, script, *threads = facts.split()
        yield Defect(id, text, script, tuple(threads), since)


DEFECTS = tuple(_read_table())
