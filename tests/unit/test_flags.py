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
        (arguments("--moe-lbl-scope", "globl"), "--moe-lbl-scope globl: unknown; allowed: micro, dp, global"),
        (arguments(*GLOBAL, num_experts=None), "--num-experts is not set"),
        (arguments(*GLOBAL, moe_aux_loss_coeff=0.0), "--moe-aux-loss-coeff is 0 for aux_loss; allowed: a number > 0"),
        (arguments(*GLOBAL, moe_router_load_balancing_type="seq_aux_loss"), "is seq_aux_loss; allowed: aux_loss"),
        (
            arguments(*GLOBAL, moe_router_load_balancing_type="seq_aux_loss", moe_router_enable_expert_bias=True),
            "replaced). The expert bias asks for an even load over the global batch already: a global loss beside it changes",
        ),
        (arguments(*GLOBAL, moe_router_load_balancing_type="sinkhorn"), "is sinkhorn; allowed: aux_loss"),
        (arguments(*GLOBAL, moe_router_load_balancing_type="none"), "is none; allowed: aux_loss"),
        (
            arguments(*GLOBAL, moe_router_load_balancing_type=["aux_loss", "global_aux_loss"], moe_aux_loss_coeff=[0.1, 0.1]),
            "ambiguous",
        ),
        (
            arguments(*GLOBAL, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=0.1),
            "--moe-aux-loss-coeff has 1 and --moe-router-load-balancing-type 2 values; give one coefficient for each type",
        ),
        (
            arguments(*GLOBAL, moe_aux_loss_coeff=[0.1, 0.2]),
            "--moe-aux-loss-coeff has 2 and --moe-router-load-balancing-type 1",
        ),
        (arguments("--moe-lbl-metrics", "brief", moe_aux_loss_coeff=[0.1, 0.2]), "--moe-aux-loss-coeff has 2 and"),
        (
            arguments(*GLOBAL, "--moe-lbl-micro-coeff", "8"),
            "--moe-lbl-micro-coeff 8: not allowed; allowed: a number from 0 to 1",
        ),
        (
            arguments(*GLOBAL, "--moe-lbl-start-iter", "100", train_iters=100),
            "--moe-lbl-start-iter 100: the training ends before, with --train-iters 100; allowed: less",
        ),
        (arguments(*GLOBAL, "--moe-lbl-group-size", "3"), "--moe-lbl-group-size 3: not allowed; allowed: a divisor"),
        (arguments(*GLOBAL, "--moe-lbl-start-iter", "-1"), "--moe-lbl-start-iter -1: not allowed"),
        (arguments("--moe-lbl-metrics", "all"), "--moe-lbl-metrics all: unknown; allowed: brief, detailed, off"),
        (arguments("--moe-lbl-metrics-dir", "d", num_experts=None), "--moe-lbl-metrics-dir d needs a mixture of experts"),
        (
            arguments("--moe-lbl-metrics", "brief", moe_router_load_balancing_type="sinkhorn"),
            "--moe-lbl-metrics brief is not supported with --moe-router-load-balancing-type sinkhorn",
        ),
        (arguments(*GLOBAL, hybrid_context_parallel=True), "not supported with --hybrid-context-parallel"),
        (arguments(*GLOBAL, mlp_chunks_for_training=4), "--mlp-chunks-for-training 4, which runs each router 4 times"),
        (arguments(*GLOBAL, use_torch_fsdp2=True), "not supported with --use-torch-fsdp2; allowed: Megatron's DDP"),
        (
            arguments(*GLOBAL, cuda_graph_impl="full_iteration", cuda_graph_warmup_steps=0),
            "not supported with full_iteration CUDA graphs and --cuda-graph-warmup-steps 0; allowed: 1 or more",
        ),
        (
            arguments(*GLOBAL, "--moe-lbl-start-iter", "5", cuda_graph_impl="local"),
            "--moe-lbl-start-iter 5 does not work with CUDA graphs, whose replays cannot change the loss: remove it",
        ),
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
        (GLOBAL, "scope global; f will be counted over the global batch on all data-parallel ranks"),
        (("--moe-lbl-scope", "dp"), "scope dp; f will be counted over the micro-batch on all data-parallel ranks"),
        ((*GLOBAL, "--moe-lbl-group-size", "2"), "on all data-parallel ranks, in groups of 2"),
        ((), "scope micro; Megatron's own loss will be left untouched"),
        ((*GLOBAL, "--moe-lbl-start-iter", "3"), "scope micro before iteration 3"),
        ((*GLOBAL, "--moe-lbl-micro-coeff", "1e-3"), "a micro-batch loss will be added with coefficient 0.001"),
        ((*GLOBAL, "--moe-lbl-metrics-dir", "d"), "the balance record will be written to d"),
    ],
)
def test_says_the_setting_and_no_numbers(command_line, line):
    """How many sequences it is depends on schedules and packing: a step measures it."""
    args = arguments(*command_line)
    settings = Settings.create(**{name: getattr(args, f"moe_lbl_{name}") for name in Settings.__dataclass_fields__})
    refusals.refuse_arguments(args, settings)
    assert line in "\n".join(settings.in_words()) and "sequences" not in "\n".join(settings.in_words())


def test_sharded_weights_are_data_parallel_ranks():
    args = arguments(*GLOBAL, "--moe-lbl-group-size", "8", data_parallel_size=4, gtp_weight_remat_size=2)
    refusals.refuse_arguments(args, Settings.create(scope="global", group_size=8))


def balance_batch(scope: str, data_parallel_size: int = 8, global_batch_size: int = 256, **settings) -> list[str]:
    sizes = {"micro_batch_size": 8, "global_batch_size": global_batch_size, "data_parallel_size": data_parallel_size}
    return flags.balance_batch(Settings.create(scope=scope, **settings), **sizes)


@pytest.mark.parametrize(
    "line, settings",
    [
        ("f would be counted over 256 sequences: 8 dp ranks x 4 micro-batches x 8", {"scope": "global"}),
        ("f would be counted over 64 sequences: 8 dp ranks x 8", {"scope": "dp"}),
        ("over 64 sequences: 2 dp ranks of 8 x 4 micro-batches x 8", {"scope": "global", "group_size": 2}),
        ("scope micro; f would be counted over 8 sequences: 8", {"scope": "micro"}),
    ],
)
def test_balance_batch_of_given_sizes(line, settings):
    assert line in balance_batch(**settings)[0]


@pytest.mark.parametrize(
    "settings, counts_more",
    [
        ({"scope": "dp", "data_parallel_size": 1, "global_batch_size": 32}, "scope global counts"),
        ({"scope": "dp", "group_size": 1}, "scope global counts"),
        ({"scope": "global", "data_parallel_size": 1, "global_batch_size": 8}, "more micro-batches or ranks count"),
        ({"scope": "dp", "data_parallel_size": 2}, None),
        ({"scope": "global", "data_parallel_size": 1}, None),
        ({"scope": "micro", "data_parallel_size": 1, "global_batch_size": 8}, None),
    ],
)
def test_says_that_a_scope_equals_micro(settings, counts_more):
    said = [line for line in balance_batch(**settings) if "equals micro" in line]
    assert len(said) == (counts_more is not None)
    assert not said or said[0].endswith(f"{counts_more} over more") and f"scope {settings['scope']} equals" in said[0]


@pytest.mark.parametrize(
    "argument, meant",
    [
        ("--moe-lbl-scop", "--moe-lbl-scope"),
        ("--moe-lb-scope=global", "--moe-lbl-scope"),
        ("--moe_lbl_scope", "--moe-lbl-scope"),
        ("--moe-lbl-metric-dir", "--moe-lbl-metrics-dir"),
    ],
)
@pytest.mark.parametrize("known_only", [False, True], ids=["parse_args", "parse_known_args"])
def test_a_near_miss_names_the_flag_that_was_meant(argument, meant, known_only, monkeypatch, capsys):
    """At the end of what argparse prints; and where a script ignores flags that it does not know."""
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", "--num-experts", "8", argument, "x"])
    monkeypatch.delenv("RANK", raising=False)
    parser = flags.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    with pytest.raises(SystemExit):
        if known_only:
            flags.activate(arguments(**vars(parser.parse_known_args()[0])))
        parser.parse_args()
    said = capsys.readouterr().err
    assert said.endswith(f"; did you mean {meant}?\n"), said
    assert known_only or "usage:" in said


def test_other_flags_of_megatron_are_no_near_misses(monkeypatch):
    pytest.importorskip("megatron.training")
    from megatron.training.arguments import add_megatron_arguments

    names = list(add_megatron_arguments(argparse.ArgumentParser())._option_string_actions)
    assert len(names) > 500
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *names])
    flags._refuse_near_misses()


def test_the_launchers_own_flag_behind_the_script(capsys):
    with pytest.raises(SystemExit):
        flags.add_arguments(argparse.ArgumentParser()).parse_args(["--cpu"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --cpu; --cpu belongs before the script\n")


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
    assert sorted(flags.FLAGS) == sorted({word for word in help_text.split() if word.startswith("--moe-lbl-")} & {*flags.FLAGS})
