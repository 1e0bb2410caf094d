"""The experiments, each a list of settings. Settings that two of them share are trained once.

The paper's Balance BSZ is the number of sequences that f counts over. On one process the whole step is one micro-batch of 32
sequences where possible, so that a run takes about a minute of one core, and `sequences:N` (counting.py) forms what scope `dp`
forms over N data-parallel ranks of one sequence each; experiment `check` trains the same with the flags alone.
"""

from __future__ import annotations

from collections.abc import Callable

from reproduce.settings import Setting

MICRO = Setting(over="sequences:1")
GLOBAL = Setting(scope="global")
BUFFER = Setting(scope="global", micro_batch=4)
FEW = Setting(batch=8, micro_batch=8, steps=800)
ALPHAS = (0.1, 0.01)


def _at(alpha: float, *settings: Setting) -> list[Setting]:
    return [changed(setting, alpha=alpha) for setting in settings]


def changed(setting: Setting, **changes: object) -> Setting:
    """The setting with other values."""
    return Setting(**{**setting.__dict__, **changes})


def balance_bsz() -> list[Setting]:
    """Figure 1, table 1: f over 1, 2, 4, 8, 16, 32 sequences of a step of 32."""
    return [MICRO, GLOBAL, *(Setting(over=f"sequences:{n}") for n in (4, 2, 8, 16))]


def balance_bsz_small_alpha() -> list[Setting]:
    """The same with a tenth of the coefficient."""
    return _at(0.01, *balance_bsz())


def shuffled() -> list[Setting]:
    """Table 2: as many tokens as a sequence has, from anywhere in the global batch."""
    return [s for alpha in ALPHAS for s in _at(alpha, MICRO, GLOBAL, Setting(over="shuffled:1"))]


def switching() -> list[Setting]:
    """Table 3: micro first, then global from 10, 30, 50 % of the training; and back at 50 %."""
    steps = GLOBAL.steps
    later = [changed(GLOBAL, over="sequences:1", start_iter=int(steps * part)) for part in (0.1, 0.3, 0.5)]
    return [MICRO, GLOBAL, *later, changed(GLOBAL, over="sequences:1", back_at=steps // 2)]


def coefficients() -> list[Setting]:
    """Table 4: is a smaller coefficient of the micro loss a substitute?"""
    return [changed(s, alpha=alpha) for alpha in (0.1, 0.03, 0.01, 0.001) for s in (MICRO, GLOBAL)]


def mixed() -> list[Setting]:
    """Table 5: 1 % (and 10 %) of a micro loss beside the global one; micro-batches of 4 sequences."""
    return [changed(MICRO, over="sequences:4"), BUFFER, changed(BUFFER, micro_coeff=0.001), changed(BUFFER, micro_coeff=0.01)]


def megatron() -> list[Setting]:
    """Against Megatron's own global_aux_loss, on 4 ranks (where its gradient is 4 times too weak)."""
    ranks = Setting(micro_batch=8, ranks=4)
    upstream = changed(ranks, loss="global_aux_loss")
    return [changed(ranks, scope="global"), upstream, changed(upstream, alpha=0.4), changed(ranks, scope="global", alpha=0.025)]


def bias() -> list[Setting]:
    """Against the aux-loss-free bias, which Megatron has for sigmoid scores only: so all of them with sigmoid scores."""
    sigmoid = Setting(score="sigmoid")
    free = [changed(sigmoid, alpha=0.0, bias_rate=rate) for rate in (1e-3, 1e-2)]
    return [changed(sigmoid, over="sequences:1"), changed(sigmoid, scope="global"), *free]


def accumulation() -> list[Setting]:
    """What accumulation costs: global with M = 1, 2, 8, 32 micro-batches of the same 32 sequences, f over those so far."""
    return [changed(GLOBAL, micro_batch=32 // m, alpha=alpha) for alpha in ALPHAS for m in (1, 8, 2, 32)]


# Of `balancing-tuning`, the best for each method, scores and number of sequences. It has not been run: these are the best
# values of the stored experiments where they have the cell, else those of the nearest cell.
TUNED: dict[tuple[str, str, int], float] = {
    **{("loss", score, n): alpha for score in ("softmax", "sigmoid") for n, alpha in ((32, 0.1), (4, 0.03), (1, 0.01))},
    **{("bias", "sigmoid", n): 0.01 for n in (32, 4, 1)},
    **{("quantile", score, n): 0.0 for score in ("softmax", "sigmoid") for n in (32, 4, 1)},
}
GRIDS = {"loss": (0.1, 0.03, 0.01, 0.003), "bias": (0.03, 0.01, 0.003), "quantile": (0.0, 0.5, 0.9)}


def balanced(method: str, score: str, sequences: int, value: float) -> Setting:
    """A method over a number of sequences of a step of 32, with its coefficient, rate or EMA."""
    whole = sequences == 32
    if method == "loss":
        over = None if whole else f"sequences:{sequences}"
        return Setting(scope="global" if whole else "micro", over=over, score=score, alpha=value)
    over = None if whole else f"{method}:{sequences}"
    if method == "bias":
        return Setting(over=over, score=score, alpha=0.0, bias_rate=value)
    return Setting(over=over, score=score, alpha=0.0, loss="quantile_balancing", quantile_ema=value)


def balancing() -> list[Setting]:
    """{loss, bias, quantile balancing} over {a sequence, a micro-batch of 4, the step}, softmax (no bias), sigmoid."""
    return [balanced(*cell, value) for cell, value in TUNED.items()]


def balancing_tuning() -> list[Setting]:
    """The coefficient, rate or EMA of each cell of `balancing`; with seeds that it does not use, `--seeds 100-101`."""
    return [balanced(*cell, value) for cell in TUNED for value in GRIDS[cell[0]]]


def hinge() -> list[Setting]:
    """A hinge for experts below 0.064 of an even share, beside the global loss with a coefficient at which experts starve."""
    weak = changed(GLOBAL, alpha=0.001)
    return [weak, *(changed(weak, scope="micro", over=f"hinge:{c}") for c in (0.1, 1, 10))]


def window() -> list[Setting]:
    """f of the last W steps: 8 sequences per step, W = 1, 4, 16, against global; and W = 4 after 160 steps of own f."""
    windows = [changed(FEW, over=f"delayed:1:{w}") for w in (1, 4, 16)]
    few = [changed(FEW, over="sequences:1"), changed(FEW, scope="global"), *windows]
    return few + [changed(FEW, over="delayed:1:4:160")] + [changed(s, alpha=0.01) for s in few]


def delay() -> list[Setting]:
    """f of an earlier step, and nothing else changed: what delay alone does, against its length, alpha and learning rate."""
    found = [changed(FEW, over=f"delayed:{d}:1", alpha=alpha) for alpha in ALPHAS for d in (0, 1, 4, 16, 2, 8)]
    return found + [changed(FEW, over=f"delayed:{d}:1", lr=1e-3) for d in (0, 4, 16)]


def check() -> list[Setting]:
    """The stand-ins of one process against the flags alone: 6 steps, the losses must agree to rounding."""
    short = Setting(steps=6)
    pairs = [
        (changed(short, over="sequences:1"), changed(short, micro_batch=1)),
        (changed(short, over="sequences:4"), changed(short, scope="dp", micro_batch=1, ranks=4)),
        (changed(short, scope="global"), changed(short, scope="dp", micro_batch=8, ranks=4)),
    ]
    return [setting for pair in pairs for setting in pair]


EXPERIMENTS: dict[str, Callable[[], list[Setting]]] = {
    experiment.__name__.replace("_", "-"): experiment
    for experiment in (
        balance_bsz,
        shuffled,
        balance_bsz_small_alpha,
        switching,
        accumulation,
        balancing_tuning,
        balancing,
        hinge,
        window,
        coefficients,
        delay,
        bias,
        megatron,
        mixed,
        check,
    )
}


def _gpu(**changes: object) -> Setting:
    """A step of 512 sequences in micro-batches of 4 on each GPU; everything by the plugin's flags."""
    return changed(Setting(alpha=0.01, micro_batch=4, batch=512, ranks=8, steps=20_000, lr=1e-3), **changes)


def gpu_balance_bsz() -> list[Setting]:
    """f over 4 (micro), 8, 16, 32 sequences (groups of GPUs, all 8), and the buffer up to 512; both coefficients."""
    curve = [_gpu(), _gpu(scope="global"), _gpu(scope="dp"), *(_gpu(scope="dp", group_size=n) for n in (2, 4))]
    return curve + [changed(setting, alpha=0.1) for setting in curve]


def gpu_switching() -> list[Setting]:
    """micro first, then global from 10, 30, 50 % of the training; and back at 50 %."""
    later = [_gpu(scope="global", start_iter=n) for n in (2000, 6000, 10_000)]
    return [_gpu(), _gpu(scope="global"), *later, _gpu(scope="global", back_at=10_000)]


def gpu_coefficients() -> list[Setting]:
    """Smaller coefficients of micro, and 1 % of micro beside global."""
    smaller = [_gpu(alpha=alpha) for alpha in (0.003, 0.001)]
    return [_gpu(), _gpu(scope="global"), *smaller, _gpu(scope="global", micro_coeff=1e-4)]


GPU_EXPERIMENTS: dict[str, Callable[[], list[Setting]]] = {
    experiment.__name__.replace("_", "-"): experiment for experiment in (gpu_balance_bsz, gpu_switching, gpu_coefficients)
}
