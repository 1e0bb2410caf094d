"""CPU mode carries Megatron's own training loop: every feature below is trained with, and compared with a run without it.

Two equalities. "The same run" (resumed, recomputed) is bit-identical: all losses are compared as
hexadecimal. "The same model in another layout" is equal to 1e-5 relative: sums in fp32 (2^-24 = 6e-8) over at most a
thousand terms in another order, through four optimizer steps of Adam, which divides small gradients by small ones.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import ranks

from megatron_cpu import arguments

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "cpu_scripts" / "pretrain_tiny.py"

TINY = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 32 --num-experts 4 --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --disable-bias-linear --position-embedding-type rope
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 16 --lr 0.01
    --lr-decay-style constant --clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer --vocab-size 60
    --make-vocab-size-divisible-by 16 --log-interval 1 --eval-interval 100 --eval-iters 0
"""

# As in the launch script of someone with GPUs: each of these can only work there.
FOR_GPUS = """
    --distributed-backend nccl --transformer-impl transformer_engine --attention-backend flash --moe-grouped-gemm
    --moe-permute-fusion --moe-router-fusion --cross-entropy-loss-fusion --cross-entropy-fusion-impl te --num-workers 4
    --fp8-format hybrid --moe-token-dispatcher-type flex --moe-enable-deepep --use-precision-aware-optimizer
    --exp-avg-dtype bf16 --cuda-graph-impl local --cuda-graph-modules attn --high-priority-stream-groups ep
    --use-nccl-ub --te-rng-tracker
"""

SAID = {
    "--distributed-backend nccl -> gloo: NCCL needs a GPU",
    "--transformer-impl transformer_engine -> local: Transformer Engine needs a GPU",
    "--attention-backend flash -> unfused: its kernel exists for CUDA only",
    "--moe-grouped-gemm removed: its kernel exists for CUDA only",
    "--no-gradient-accumulation-fusion added: its kernel exists for CUDA only",
    "--moe-token-dispatcher-type flex -> alltoall: DeepEP and HybridEP need GPUs",
    "--fp8-format hybrid -> (none): Transformer Engine needs a GPU",
    "--num-workers 4 -> 0: a worker process would not have the stand-in for torch.cuda",
}


class Run:
    """What a training run printed."""

    def __init__(self, output: str) -> None:
        self.output = output
        # Per iteration the losses of all micro-batches as they are printed, in an order that the ranks' race does not change.
        self.exact: dict[int, list[str]] = defaultdict(list)
        for iteration, rank, value in re.findall(r"LOSS (\d+) (\d+) (-?0x[0-9a-fp.+-]+)", output):
            self.exact[int(iteration)].append(f"{rank} {value}")
        for losses in self.exact.values():
            losses.sort()
        self.said = re.findall(r"^--cpu: (.*)$", output, re.MULTILINE)

    def loss(self, iteration: int) -> float:
        values = [float.fromhex(line.split()[1]) for line in self.exact[iteration]]
        return sum(values) / len(values)

    def grad_norm(self, iteration: int) -> float:
        return float(re.findall(rf"iteration +{iteration}/.*grad norm: ([0-9.]+)", self.output)[0])


def train(processes: int, *flags: str, iterations: int = 4) -> Run:
    """Train on that many processes; `flags` are strings of command-line arguments. Fails with the run's last output."""
    command = [
        "-m",
        "megatron_global_lbl",
        "--cpu",
        str(SCRIPT),
        *" ".join([TINY, *flags, f"--train-iters {iterations}"]).split(),
    ]
    status, output = ranks.run(command, processes, timeout=500)
    assert status == 0, output[-4000:]
    return Run(output)


# --- One model, in layouts. Without dropout, because its random numbers depend on the layout. ---

PLAIN = "--hidden-dropout 0 --attention-dropout 0 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Run, str]:
    """fp32 on one rank, five steps, and the checkpoint after the first two."""
    folder = tmp_path_factory.mktemp("whole")
    return train(1, PLAIN, f"--save {folder} --save-interval 2", iterations=5), f"--load {folder} --ckpt-step 2 --no-load-rng"


def assert_same_model(run: Run, whole: Run) -> None:
    assert sorted(run.exact) == [3, 4, 5]
    for iteration in (3, 4, 5):
        assert run.loss(iteration) == pytest.approx(whole.loss(iteration), rel=1e-5)
        # Printed with three decimals. Wrong gradients that Adam would hide (a factor) show here.
        assert run.grad_norm(iteration) == pytest.approx(whole.grad_norm(iteration), abs=0.0011)


def test_fp32_learns(whole):
    run, _ = whole
    losses = [run.loss(iteration) for iteration in range(1, 6)]
    assert all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(64), abs=0.3)  # nothing learned: uniform over the padded vocabulary
    assert losses[-1] < losses[0] - 0.8


def test_tensor_parallel_with_sequence_parallel_and_pipeline(whole):
    run, checkpoint = whole
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
    assert_same_model(train(4, PLAIN, checkpoint, layout, iterations=5), run)


# --- One run, saved and resumed. With dropout: its random numbers have to continue, too. ---

EXPERT_PARALLEL = "--expert-model-parallel-size 2"
OVERLAP = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


@pytest.fixture(scope="module")
def launched_for_gpus(tmp_path_factory) -> tuple[Run, str]:
    """bf16, data and expert parallel over two ranks, distributed optimizer with overlap; saved after two of four steps."""
    folder = tmp_path_factory.mktemp("gpus")
    run = train(
        2, EXPERT_PARALLEL, OVERLAP, FOR_GPUS, f"--save {folder} --save-interval 2 --eval-iters 1 --log-memory-interval 1"
    )
    return run, f"--load {folder} --ckpt-step 2"


def test_launch_script_for_gpus_trains(launched_for_gpus):
    run, _ = launched_for_gpus
    assert run.loss(4) < run.loss(1) - 0.5
    assert len(run.exact[1]) == 8  # 16 samples in micro-batches of 2, over both ranks


def test_each_change_is_said_once(launched_for_gpus):
    run, _ = launched_for_gpus
    assert SAID <= set(run.said)
    assert set(Counter(run.said).values()) == {1}


def test_evaluation_and_rank_0_reports(launched_for_gpus):
    run, _ = launched_for_gpus
    (validation,) = re.findall(r"validation loss at iteration 4 on validation set \| lm loss value: (\S+)", run.output)
    assert 0 < float(validation) < run.loss(1)
    assert re.search(r"\[Rank 0\] \(after 2 iterations\) memory \(MB\) \| allocated: 0\.00", run.output)


def test_resumed_run_is_bit_identical(launched_for_gpus):
    run, checkpoint = launched_for_gpus
    again = train(2, EXPERT_PARALLEL, OVERLAP, "--moe-token-dispatcher-type alltoall", checkpoint)
    assert again.exact == {iteration: run.exact[iteration] for iteration in (3, 4)}


def test_recomputed_run_is_bit_identical(launched_for_gpus):
    run, checkpoint = launched_for_gpus
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    again = train(2, EXPERT_PARALLEL, OVERLAP, "--moe-token-dispatcher-type alltoall", checkpoint, recompute)
    assert again.exact == {iteration: run.exact[iteration] for iteration in (3, 4)}


# --- The pieces. ---


def test_not_loaded_unless_asked_for():
    code = "import sys, megatron_global_lbl; print([name for name in sys.modules if name.startswith('megatron_cpu')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


STAND_IN = """
import os
import torch
import megatron_cpu
megatron_cpu.install()
first = torch.cuda.is_available
megatron_cpu.install()
assert torch.cuda.is_available is first, "installed twice"
os.environ.update(LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")  # a fork, which has its own place
megatron_cpu.install()
assert (torch.cuda.current_device(), torch.cuda.device_count(), len(torch.cuda.default_generators)) == (1, 2, 2)

for device in ("cuda", "cuda:1", 0, torch.device("cuda", 0), torch.cuda.current_device()):
    assert torch.ones(2, device=device).device.type == "cpu", device
    assert torch.ones(2).to(device).device.type == "cpu", device
assert torch.nn.Linear(2, 2, device="cuda").cuda().to("cuda").weight.device.type == "cpu"
assert torch.ones(2).type() == "torch.cuda.FloatTensor" and torch.ones(2).to(torch.float16).dtype is torch.float16
assert isinstance(torch.ones(2), torch.cuda.FloatTensor)

class MakesTensorInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.ones(2, device="cuda")

for run in (lambda y: y.backward(), torch.autograd.backward):
    x = torch.zeros(2, requires_grad=True)
    run(MakesTensorInBackward.apply(x).sum())
    assert x.grad.tolist() == [2.0, 2.0]

state = torch.cuda.get_rng_state()
drawn = torch.rand(3)
next(iter(torch.utils.data.DataLoader([1, 2], pin_memory=True)))
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3, device="cuda"), drawn)
after = torch.cuda.get_rng_state()
iter(torch.utils.data.DataLoader([1, 2]))
assert torch.equal(torch.cuda.get_rng_state(), after), "a data loader moved the generator of dropout"

begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
with torch.cuda.stream(torch.cuda.Stream()):
    begin.record()
    end.record()
torch.cuda.current_stream().wait_event(end)
assert begin.elapsed_time(end) >= 0

import sys
assert "megatron_global_lbl" not in sys.modules, "CPU mode needs nothing of the plugin"
"""


def test_stand_in_for_torch_cuda():
    done = subprocess.run([sys.executable, "-c", STAND_IN], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def parser_with(*flags: tuple[str, dict]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for flag, options in flags:
        parser.add_argument(flag, **options)
    return parser


@pytest.mark.parametrize("rank, lines", [("0", 3), ("1", 0)])
def test_changes_are_told_by_rank_0_in_words_of_the_command_line(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(arguments, "_told", set())
    parser = parser_with(
        ("--distributed-backend", {"default": "nccl"}),
        ("--moe-permute-fusion", {"action": "store_true"}),
        ("--no-rope-fusion", {"action": "store_false", "dest": "apply_rope_fusion"}),
        ("--num-workers", {"type": int, "default": 2}),
    )
    for _ in range(2):  # Megatron parses more than once in some set-ups
        namespace = parser.parse_args(["--moe-permute-fusion", "--num-workers", "0"])
        arguments.change(namespace, parser)
    assert (namespace.distributed_backend, namespace.moe_permute_fusion, namespace.apply_rope_fusion) == ("gloo", False, False)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    if lines:
        assert [line.split(": ")[1] for line in said] == [
            "--distributed-backend nccl -> gloo",
            "--moe-permute-fusion removed",
            "--no-rope-fusion added",
        ]


def test_arguments_that_run_on_a_cpu_are_left_alone(capsys):
    parser = parser_with(
        ("--distributed-backend", {}), ("--moe-token-dispatcher-type", {}), ("--recompute-modules", {"nargs": "*"})
    )
    given = [
        "--distributed-backend",
        "gloo",
        "--moe-token-dispatcher-type",
        "allgather",
        "--recompute-modules",
        "core_attn",
        "moe",
    ]
    namespace = parser.parse_args(given)
    arguments.change(namespace, parser)
    assert namespace == parser.parse_args(given)
    assert capsys.readouterr().out == ""
