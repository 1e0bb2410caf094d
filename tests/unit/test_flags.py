"""The flags against Megatron's validated arguments: what cannot work ends the run with one line before training."""

import argparse

import pytest

from megatron_global_lbl import flags
from megatron_global_lbl.hook import refusals
from megatron_global_lbl.settings import ConfigError, Settings


def arguments(*command_line: str, **megatron) -> argparse.Namespace:
    """Parsed flags beside what Megatron would have validated: an MoE model on 8 data-parallel ranks."""
    args = flags.add_arguments(argparse.ArgumentParser()).parse_args(command_line)
    defaults = {
        "num_experts": 8,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "data_parallel_size": 8,
        "micro_batch_size": 8,
        "global_batch_size": 256,
        "save": None,
        "ckpt_format": "torch_dist",
    }
    return argparse.Namespace(**{**vars(args), **defaults, **megatron})


GLOBAL = ("--moe-lbl-scope", "global")


@pytest.mark.parametrize(
    "args, message",
    [
        (arguments("--moe-lbl-scope", "globl"), "--moe-lbl-scope globl: unknown; allowed: micro, dp, global, window"),
        (arguments(*GLOBAL, num_experts=None), "--num-experts is not set"),
        (arguments(*GLOBAL, moe_aux_loss_coeff=0.0), "--moe-aux-loss-coeff is 0 for aux_loss; allowed: a number > 0"),
        (arguments(*GLOBAL, moe_router_load_balancing_type="seq_aux_loss"), "is seq_aux_loss; allowed: aux_loss"),
        (arguments(*GLOBAL, moe_router_load_balancing_type="sinkhorn"), "is sinkhorn; allowed: aux_loss"),
        (arguments(*GLOBAL, moe_router_load_balancing_type="none"), "is none; allowed: aux_loss"),
        (
            arguments(*GLOBAL, moe_router_load_balancing_type=["aux_loss", "global_aux_loss"], moe_aux_loss_coeff=[0.1, 0.1]),
            "ambiguous",
        ),
        (arguments(*GLOBAL, "--moe-lbl-group-size", "3"), "--moe-lbl-group-size 3: not allowed; allowed: a divisor"),
        (arguments(*GLOBAL, "--moe-lbl-window-steps", "4"), "--moe-lbl-window-steps 4 has no effect"),
        (arguments("--moe-lbl-scope", "window", "--moe-lbl-window-steps", "0"), "allowed: an integer >= 1"),
        (arguments(*GLOBAL, "--moe-lbl-start-iter", "-1"), "--moe-lbl-start-iter -1: not allowed"),
        (arguments("--moe-lbl-metrics", "all"), "--moe-lbl-metrics all: unknown; allowed: brief, detailed, off"),
        (arguments("--moe-lbl-metrics-dir", "d", num_experts=None), "--moe-lbl-metrics-dir d needs a mixture of experts"),
        (
            arguments("--moe-lbl-metrics", "brief", moe_router_load_balancing_type="sinkhorn"),
            "--moe-lbl-metrics brief is not supported with --moe-router-load-balancing-type sinkhorn",
        ),
        (
            arguments(*GLOBAL, "--moe-lbl-metrics", "brief", cuda_graph_impl="local"),
            "--moe-lbl-metrics brief is not supported with CUDA graphs; allowed: without",
        ),
        (arguments(*GLOBAL, hybrid_context_parallel=True), "not supported with --hybrid-context-parallel"),
        (arguments(*GLOBAL, mlp_chunks_for_training=4), "--mlp-chunks-for-training 4, which runs each router 4 times"),
        (arguments(*GLOBAL, use_torch_fsdp2=True), "not supported with --use-torch-fsdp2; allowed: Megatron's DDP"),
        (
            arguments(*GLOBAL, cuda_graph_impl="full_iteration", cuda_graph_warmup_steps=0),
            "not supported with full_iteration CUDA graphs and --cuda-graph-warmup-steps 0; allowed: 1 or more",
        ),
        (
            arguments(
                "--moe-lbl-scope",
                "dp",
                "--moe-lbl-metrics-dir",
                "d",
                cuda_graph_impl="local",
                cuda_graph_scope=["full_iteration"],
            ),
            "--moe-lbl-metrics-dir d is not supported with CUDA graphs; allowed: without",
        ),
        (
            arguments(*GLOBAL, "--moe-lbl-start-iter", "5", cuda_graph_impl="local"),
            "--moe-lbl-start-iter 5 is not supported with CUDA graphs; allowed: without",
        ),
        (arguments("--moe-lbl-scope", "window", save="x", ckpt_format="torch_dcp"), "--ckpt-format torch_dcp"),
    ],
)
def test_refused_with_one_line(args, message, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as exit:
        flags.activate(args)
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.startswith("megatron_global_lbl: error: ")


@pytest.mark.parametrize("release", [(0, 18), (0, 19), (0, 20)])
def test_megatron_fsdp_where_it_was_proven(release, monkeypatch):
    from megatron_global_lbl.hook import compatibility, refusals

    monkeypatch.setattr(compatibility, "require_supported", lambda: release)
    args = arguments(*GLOBAL, use_megatron_fsdp=True)
    if release != (0, 18):
        refusals.refuse_arguments(args, Settings.create(scope="global"))
        args.cuda_graph_impl = "local"
        with pytest.raises(ConfigError, match="--use-megatron-fsdp is not supported with CUDA graphs"):
            refusals.refuse_arguments(args, Settings.create(scope="global"))
        args.megatron_fsdp_version = 2  # an argument since 0.20
        with pytest.raises(ConfigError, match="not supported with --megatron-fsdp-version 2 .*; allowed: 1"):
            refusals.refuse_arguments(args, Settings.create(scope="global"))
        return
    with pytest.raises(ConfigError, match="not supported with --use-megatron-fsdp; allowed: .* Megatron-Core 0.19 or 0.20 "):
        refusals.refuse_arguments(args, Settings.create(scope="global"))


@pytest.mark.parametrize(
    "command_line, line",
    [
        (GLOBAL, "f counted over 256 sequences: 8 dp ranks x 4 micro-batches x 8"),
        (("--moe-lbl-scope", "dp"), "f counted over 64 sequences: 8 dp ranks x 8"),
        (("--moe-lbl-scope", "window"), "f counted over 256 sequences: 8 dp ranks x 4 micro-batches x 8 x 1 step"),
        ((*GLOBAL, "--moe-lbl-group-size", "2"), "f counted over 64 sequences: 2 dp ranks of 8 x 4 micro-batches x 8"),
        ((), "scope micro; f counted over 8 sequences: 8 (Megatron's own loss, untouched)"),
    ],
)
def test_describes_the_balance_batch(command_line, line):
    args = arguments(*command_line)
    settings = Settings.create(**{name: getattr(args, f"moe_lbl_{name}") for name in Settings.__dataclass_fields__})
    assert line in flags.describe(args, settings)[0]
    args.data_parallel_size, args.gtp_weight_remat_size = 4, 2  # the same ranks, weights sharded over pairs
    refusals.refuse_arguments(args, settings)
    assert line in flags.describe(args, settings)[0]


@pytest.mark.parametrize(
    "command_line, megatron, counts_more",
    [
        (("--moe-lbl-scope", "dp"), {"data_parallel_size": 1}, "scope global counts"),
        (("--moe-lbl-scope", "dp", "--moe-lbl-group-size", "1"), {}, "scope global counts"),
        (GLOBAL, {"data_parallel_size": 1, "global_batch_size": 8}, "more micro-batches or ranks count"),
        (("--moe-lbl-scope", "dp"), {"data_parallel_size": 2}, None),
        (("--moe-lbl-scope", "dp"), {"data_parallel_size": 1, "gtp_weight_remat_size": 2}, None),
        (GLOBAL, {"data_parallel_size": 1}, None),
        (("--moe-lbl-scope", "window"), {"data_parallel_size": 1, "global_batch_size": 8}, None),
        ((), {"data_parallel_size": 1, "global_batch_size": 8}, None),
    ],
)
def test_says_that_a_scope_equals_micro(command_line, megatron, counts_more):
    args = arguments(*command_line, **megatron)
    settings = Settings.create(**{name: getattr(args, f"moe_lbl_{name}") for name in Settings.__dataclass_fields__})
    said = [line for line in flags.describe(args, settings) if "equals micro" in line]
    if counts_more is None:
        assert said == []
    else:
        assert said == [
            f"!! scope {settings.scope.value} equals micro here: f is counted over one micro-batch of one data-parallel rank; "
            f"{counts_more} over more"
        ]


@pytest.mark.parametrize(
    "rank, local_rank, seconds",
    [
        (None, None, 0),  # not under torchrun
        (0, 0, 0),
        (8, 0, 10),  # the first of another node, where rank 0's exit ends nobody
        (1, 1, 20),
        (9, 1, 20),
    ],
)
def test_rank_0_speaks_first(rank, local_rank, seconds, monkeypatch, capsys):
    """Under torchrun the rest is ended while it waits: `tests/megatron/test_bad_input.py`."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        assert capsys.readouterr().err == ""

    monkeypatch.setattr(flags.time, "sleep", sleep)
    with pytest.raises(SystemExit) as exit:
        flags.activate(arguments("--moe-lbl-scope", "globl"))
    assert exit.value.code == 1 and sum(waited) == seconds
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_flags_have_a_group_of_their_own():
    parser = flags.add_arguments(argparse.ArgumentParser())
    help_text = parser.format_help()
    assert "mixture-of-experts load-balancing loss:" in help_text
    assert help_text.count("--moe-lbl-") >= 7
