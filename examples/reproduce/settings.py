"""One run of an experiment: what differs between runs, and the Megatron arguments it becomes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from demo.prepare import VOCAB_SIZE


@dataclass(frozen=True)
class Setting:
    """A run up to its seed. The defaults are the plain case; a name mentions what differs from them."""

    scope: str = "micro"  # --moe-lbl-scope
    over: str | None = None  # --reproduce-count, a balance loss of counting.py in place of Megatron's own
    alpha: float = 0.1
    micro_batch: int = 32  # sequences
    batch: int = 32  # sequences of a step, over all ranks
    ranks: int = 1  # data-parallel
    steps: int = 400
    start_iter: int = 0
    back_at: int = 0  # from this iteration on scope micro, by a second training from a checkpoint
    micro_coeff: float = 0.0
    group_size: int | None = None
    loss: str = "aux_loss"
    score: str = "softmax"
    bias_rate: float = 0.0  # of the expert bias; 0: no bias
    quantile_ema: float = 0.0  # of quantile balancing, loss="quantile_balancing"
    lr: float = 4e-3

    @classmethod
    def stored(cls, values: dict[str, Any]) -> Setting:
        """The setting of a stored result. Rows of the former scope `window` are read as the stand-in that trains the same."""
        values = dict(values)
        steps = values.pop("window_steps", None)
        if values["scope"] == "window":
            own = f":{values['start_iter']}" if values["start_iter"] else ""
            values |= {"scope": "micro", "over": f"delayed:1:{steps}{own}", "start_iter": 0}
        return cls(**values)

    @property
    def name(self) -> str:
        """Unique, and fit for a file name."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{name}={str(value).replace(':', '-')}" for name, value in changed) or "plain"


@dataclass(frozen=True)
class Run:
    """A setting and a seed. The seed draws the model's weights and the order of the data: equal seeds make a pair."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.name},seed={self.seed}"


CPU_MODEL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 2 --num-experts 64 --moe-router-topk 2
    --moe-ffn-hidden-size 48 --init-method-std 0.09 --adam-beta2 0.98 --reproduce-stacked-experts
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-masked-softmax-fusion --no-rope-fusion --num-workers 0
    --ckpt-format torch
"""
# 0.2 billion parameters of which 35 million are active; needs Transformer Engine.
GPU_MODEL = """
    --num-layers 8 --hidden-size 512 --ffn-hidden-size 512 --num-attention-heads 8 --num-experts 64 --moe-router-topk 4
    --moe-ffn-hidden-size 256 --init-method-std 0.02 --adam-beta2 0.95 --bf16 --moe-grouped-gemm --use-distributed-optimizer
"""


def arguments(run: Run, *, size: str, data: Path, index: dict, out: Path) -> list[str]:
    """Everything after the script's name. The flags of the plugin are the last."""
    s = run.setting
    quantiles = s.loss == "quantile_balancing"
    kind = s.loss if s.alpha or quantiles else "none"
    common = f"""
        --seq-length {index["sequence_length"]} --max-position-embeddings {index["sequence_length"]}
        --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader
        --moe-router-dtype fp32 --moe-router-load-balancing-type {kind} --moe-aux-loss-coeff {s.alpha}
        --moe-token-dispatcher-type allgather --moe-router-score-function {s.score}
        --micro-batch-size {s.micro_batch} --global-batch-size {s.batch} --train-iters {s.steps} --seed {1234 + run.seed}
        --lr {s.lr} --min-lr {s.lr / 10} --lr-decay-style cosine --lr-warmup-iters {max(1, s.steps // 20)}
        --weight-decay 0.1 --clip-grad 1.0 --eval-iters 0 --eval-interval {s.steps + 1} --log-interval 10
        --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 1
    """
    if s.bias_rate:
        common += f" --moe-router-enable-expert-bias --moe-router-bias-update-rate {s.bias_rate}"
    if quantiles:
        common += f" --moe-router-quantile-balancing-ema {s.quantile_ema}"
    words = ((CPU_MODEL if size == "cpu" else GPU_MODEL) + common).split()
    words += ["--data-cache-path", str(out / "cache" / run.name), "--reproduce-data", str(data)]
    words += ["--train-data-path", *(part for d in index["domains"] for part in ("1", str(data / f"{d['stem']}_train")))]
    if s.over is not None:
        words += ["--reproduce-count", s.over]
    return words


def plugin_flags(setting: Setting) -> list[str]:
    """The flags `--moe-lbl-*`."""
    words = ["--moe-lbl-scope", setting.scope]
    for name in ("start_iter", "micro_coeff", "group_size"):
        if getattr(setting, name):
            words += ["--moe-lbl-" + name.replace("_", "-"), str(getattr(setting, name))]
    return words
