"""Stage 5: the Triton kernels on [T, E] with other block sizes, programs and warps, against the memory's bandwidth.

They read and write 17 bytes per token and expert (float32 logits): the limit is the time of a copy that moves as many. Every
setting's result is compared with PyTorch's first. What is best goes into core/fused/forward.py, with the report as its source.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from stage import Stage, paths

paths()

SIZES = ((65536, 128), (16384, 128), (65536, 64), (65536, 256))
BLOCKS, PROGRAMS, WARPS = (1024, 2048, 4096, 8192), (66, 128, 132, 264, 528), (2, 4, 8, 16)
CHOSEN_WARPS = 4  # Triton's default
LAUNCHES, BYTES = 20, {"count": 5, "logits": 12}  # bytes per token and expert
SECONDS_OF_A_SIZE = 15


def timed(work: Callable[[], Any], cpu: bool) -> float:
    """Microseconds of a call, median; the first call compiles."""
    import torch

    work()
    times = []
    for _ in range(2 if cpu else LAUNCHES):
        if cpu:
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) * 1e6)
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000)
    return round(statistics.median(times), 2)


class Kernels:
    """The kernels on tensors of a size, with any setting."""

    def __init__(self, tokens: int, experts: int, device: str) -> None:
        import torch

        self.tokens, self.experts = tokens, experts
        generator = torch.Generator(device).manual_seed(1)
        self.logits, self.incoming = torch.randn(2, tokens, experts, generator=generator, device=device).unbind()
        self.selection = torch.zeros(tokens, experts, dtype=torch.bool, device=device)
        self.selection.scatter_(1, self.logits.topk(min(8, experts - 1)).indices, True)
        self.gradient = torch.rand(experts, generator=generator, device=device)
        self.outgoing = torch.empty_like(self.incoming)
        self.ticket = torch.zeros((), dtype=torch.int32, device=device)
        self.counts = torch.empty(experts, dtype=torch.int32, device=device)
        self.sums = torch.empty(experts, device=device)
        probs = self.logits.double().softmax(1)
        weighted = probs * self.gradient
        self.true_sums = probs.sum(0)
        self.true_outgoing = self.incoming + weighted - probs * weighted.sum(1, keepdim=True)
        self.shares = torch.empty(2, max(PROGRAMS), 1 << (experts - 1).bit_length(), dtype=torch.int32, device=device)

    def blocks(self, block: int) -> tuple[int, int]:
        """BLOCK_E and BLOCK_T."""
        block_E = 1 << (self.experts - 1).bit_length()
        return block_E, max(1, block // block_E)

    def count(self, block: int, programs: int, warps: int) -> None:
        import torch

        from megatron_global_lbl.core.fused.kernels import count_kernel

        selected, shares = self.selection.view(torch.uint8), self.shares
        arguments = (self.logits, selected, selected, shares[0], shares[1].view(torch.float32), self.ticket)
        block_E, block_T = self.blocks(block)
        constants = (self.experts, block_E, block_T, 0, False)
        programs = min((self.tokens + block_T - 1) // block_T, programs)
        count_kernel[(programs,)](*arguments, self.counts, self.sums, self.tokens, *constants, num_warps=warps)

    def add_to_gradient(self, block: int, programs: int | None, warps: int) -> None:
        from megatron_global_lbl.core.fused.kernels import logits_kernel

        block_E, block_T = self.blocks(block)
        arguments = (self.logits, self.logits, self.gradient, 1.0, self.incoming, self.outgoing, self.tokens)
        grid = ((self.tokens + block_T - 1) // block_T,)
        logits_kernel[grid](*arguments, self.experts, block_E, block_T, 0, False, num_warps=warps)

    def check(self, kernel: str) -> None:
        """
        Raises:
            AssertionError: what the last launch wrote is wrong.
        """
        if kernel == "count":
            assert self.counts.equal(self.selection.sum(0).int()) and self.ticket.item() == 0, "counts"
            error = (self.sums.double() - self.true_sums).norm() / self.true_sums.norm()
        else:
            error = (self.outgoing.double() - self.true_outgoing).norm() / self.true_outgoing.norm()
        assert error < 1e-5, f"{kernel}: {float(error):.1e}"


def settings(kernel: str, cpu: bool) -> Iterator[tuple[int, int | None, int]]:
    """(block, programs, warps), what the code has first."""
    from megatron_global_lbl.core.fused import forward

    chosen = (forward.BLOCK, forward.PROGRAMS if kernel == "count" else None, CHOSEN_WARPS)
    yield chosen
    blocks, warps = (BLOCKS[:1], WARPS[:1]) if cpu else (BLOCKS, WARPS)
    programs = (None,) if kernel != "count" else PROGRAMS[:1] if cpu else PROGRAMS
    yield from (setting for setting in itertools.product(blocks, programs, warps) if setting != chosen)


def main() -> None:
    stage = Stage("sweep")
    if stage.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    device = "cpu" if stage.cpu else "cuda"
    stage.data["sizes"] = []
    for tokens, experts in ((96, 16),) if stage.cpu else SIZES[:1] if stage.quick else SIZES:
        kernels = Kernels(tokens, experts, device)
        for kernel, launch in {"count": kernels.count, "logits": kernels.add_to_gradient}.items():
            what = f"{kernel}, {tokens} x {experts}"
            if stage.left < SECONDS_OF_A_SIZE:
                stage.skip(what, "no time left")
                continue
            source = torch.empty(tokens * experts * BYTES[kernel] // 2, dtype=torch.uint8, device=device)
            limit = timed(lambda source=source: source.clone(), stage.cpu)
            size = {"kernel": kernel, "tokens": tokens, "experts": experts, "limit, us": limit, "rows": []}
            stage.data["sizes"].append(size)
            with stage.check(what) as entry:
                for number, (block, programs, warps) in enumerate(settings(kernel, stage.cpu)):
                    if stage.left < SECONDS_OF_A_SIZE / 3:
                        break
                    took = timed(lambda s=(block, programs, warps), launch=launch: launch(*s), stage.cpu)
                    kernels.check(kernel)
                    row = {"block": block, "programs": programs, "warps": warps, "us": took, "chosen": number == 0}
                    size["rows"].append(row)
                best = min(row["us"] for row in size["rows"])
                entry["best over the limit"] = round(best / limit, 2)
            stage.save()


if __name__ == "__main__":
    main()
