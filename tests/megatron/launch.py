"""Starts a real training as a user would, and reads its losses back from the TensorBoard event file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ranks

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain_gpt_moe.py"
TIMEOUT_SECONDS = 300

TINY = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --swiglu --disable-bias-linear
    --seq-length 32 --max-position-embeddings 32 --attention-dropout 0 --hidden-dropout 0
    --num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.05 --moe-router-load-balancing-type aux_loss
    --micro-batch-size 1 --global-batch-size 8 --train-iters 6 --lr 5e-3 --clip-grad 1.0 --seed 7
    --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --split 90,5,5 --num-workers 0
    --distributed-backend gloo --transformer-impl local --use-cpu-initialization --no-bias-swiglu-fusion
    --log-interval 1 --eval-interval 100 --eval-iters 1 --tensorboard-log-interval 1
""".split()


@dataclass
class Run:
    """A finished training."""

    returncode: int
    output: str
    directory: Path

    def scalars(self, tag: str) -> dict[int, float]:
        """Value by iteration of a TensorBoard tag, all files of the run."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(self.directory / "tensorboard"))
        accumulator.Reload()
        return {event.step: event.value for event in accumulator.Scalars(tag)}

    def curve(self) -> dict[int, tuple[float, float]]:
        """(lm loss, gradient norm) by iteration, as float32 wrote them: equal means bit-identical."""
        losses, norms = self.scalars("lm loss"), self.scalars("grad-norm")
        return {step: (losses[step], norms[step]) for step in losses}


def train(
    directory: Path,
    *arguments: str,
    processes: int = 2,
    plugin: bool = True,
    check: bool = True,
    leave_out: tuple[str, ...] = (),
    by_torchrun: bool = False,
) -> Run:
    """Train the tiny model with extra arguments, and without some of its flags that take no value; without the plugin it is
    Megatron alone in the same CPU mode. Its ranks are forks (ranks.py) unless it is `by_torchrun`."""
    launcher = ["-m", "megatron_global_lbl", "--cpu"] if plugin else [str(Path(__file__).parent / "without_plugin.py")]
    tiny = [argument for argument in TINY if argument not in leave_out]
    command = [*launcher, str(SCRIPT), *tiny, "--tensorboard-dir", str(directory / "tensorboard"), *arguments]
    start = torchrun if by_torchrun else ranks.run
    returncode, output = start(command, processes, TIMEOUT_SECONDS)
    if check and returncode:
        raise AssertionError(f"training failed with {returncode}:\n{output[-6000:]}")
    return Run(returncode, output, directory)


def torchrun(
    arguments: list[str], processes: int, timeout: float, environment: Mapping[str, str] = os.environ
) -> tuple[int, str]:
    """(exit status, what was printed) of `torchrun` with these arguments."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    return result.returncode, result.stdout
