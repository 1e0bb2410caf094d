"""Launcher + `pretrain`: trains, saves, resumes bit-identically in every scope; `micro` is Megatron itself."""

from __future__ import annotations

import pytest
from launch import Run, train

# Layouts differ so that the checkpoints do: bf16 with the distributed optimizer, EP, pipeline stages, both formats.
LAYOUTS = {
    "micro": (2, []),
    "dp": (2, ["--bf16", "--use-distributed-optimizer"]),
    "global": (2, ["--expert-model-parallel-size", "2", "--ckpt-format", "torch"]),
    "window": (4, ["--pipeline-model-parallel-size", "2", "--moe-lbl-window-steps", "2"]),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Six iterations in one go per scope, with a checkpoint after the third; made when first asked for."""
    runs: dict[str, Run] = {}

    def get(scope: str) -> Run:
        if scope not in runs:
            processes, arguments = LAYOUTS[scope]
            directory = tmp_path_factory.mktemp(scope)
            save = ["--save", str(directory / "checkpoint"), "--save-interval", "3"]
            runs[scope] = train(directory, "--moe-lbl-scope", scope, *arguments, *save, processes=processes)
        return runs[scope]

    return get


@pytest.mark.parametrize("scope", LAYOUTS)
def test_trains_and_resumes_bit_identically(undisturbed, tmp_path, scope):
    whole = undisturbed(scope)
    curve = whole.curve()
    assert sorted(curve) == [1, 2, 3, 4, 5, 6]
    assert curve[6][0] < curve[1][0] - 0.02, "the loss does not fall"
    processes, arguments = LAYOUTS[scope]
    load = ["--load", str(whole.directory / "checkpoint"), "--ckpt-step", "3"]
    resumed = train(tmp_path, "--moe-lbl-scope", scope, *arguments, *load, processes=processes)
    assert resumed.curve() == {step: curve[step] for step in (4, 5, 6)}
    assert ("window continues with 2 steps" in resumed.output) == (scope == "window")


def test_resumes_bit_identically_from_a_resumed_run(undisturbed, tmp_path):
    """The second checkpoint holds the newest window of every pipeline stage, not what the first one brought."""
    curve, checkpoint = undisturbed("window").curve(), str(undisturbed("window").directory / "checkpoint")
    processes, arguments = LAYOUTS["window"]
    arguments = ["--moe-lbl-scope", "window", *arguments]
    second = str(tmp_path / "checkpoint")
    stop = ["--save", second, "--save-interval", "1", "--exit-interval", "4"]
    train(tmp_path / "once", *arguments, "--load", checkpoint, "--ckpt-step", "3", *stop, processes=processes)
    twice = train(tmp_path / "twice", *arguments, "--load", second, "--ckpt-step", "4", processes=processes)
    assert twice.curve() == {step: curve[step] for step in (5, 6)}


def test_megatron_fsdp_resumes_its_window_bit_identically(tmp_path):
    """In its own checkpoint format. Without SwiGLU and without shards: Megatron 0.19 cannot save the one in fp32, nor Adam's
    state of parameters of which a rank has nothing."""
    arguments = ["--moe-lbl-scope", "window", "--moe-lbl-window-steps", "2", "--use-megatron-fsdp"]
    arguments += ["--data-parallel-sharding-strategy", "no_shard", "--ckpt-format", "fsdp_dtensor"]
    arguments += ["--use-distributed-optimizer", "--no-gradient-accumulation-fusion"]
    checkpoint = str(tmp_path / "checkpoint")
    leave_out = ("--swiglu", "--no-bias-swiglu-fusion")
    save = ["--save", checkpoint, "--save-interval", "3"]
    curve = train(tmp_path / "whole", *arguments, *save, leave_out=leave_out).curve()
    assert sorted(curve) == [1, 2, 3, 4, 5, 6]
    resumed = train(tmp_path / "resumed", *arguments, "--load", checkpoint, "--ckpt-step", "3", leave_out=leave_out)
    assert resumed.curve() == {step: curve[step] for step in (4, 5, 6)}
    assert resumed.output.count("window continues with 2 steps") == 1


def test_micro_is_megatron_bit_by_bit(undisturbed, tmp_path):
    plain = train(tmp_path, plugin=False)
    assert plain.curve() == undisturbed("micro").curve()


def test_scopes_are_really_different(undisturbed):
    """Else the tests above would pass with a hook that does nothing (same layout: dp 2, fp32)."""
    assert undisturbed("global").curve()[2] != undisturbed("micro").curve()[2]


def test_window_checkpoint_loads_without_the_plugin(undisturbed, tmp_path):
    checkpoint = str(undisturbed("window").directory / "checkpoint")
    run = train(
        tmp_path, "--pipeline-model-parallel-size", "2", "--load", checkpoint, "--ckpt-step", "3", processes=4, plugin=False
    )
    assert sorted(run.curve()) == [4, 5, 6]


def test_checkpoint_without_window_starts_it_anew(undisturbed, tmp_path):
    checkpoint = str(undisturbed("micro").directory / "checkpoint")
    run = train(tmp_path, "--moe-lbl-scope", "window", "--load", checkpoint, "--ckpt-step", "3")
    assert sorted(run.curve()) == [4, 5, 6]
    assert run.output.count("the checkpoint holds no window: it starts anew") == 1


def test_says_once_what_is_counted(undisturbed):
    assert undisturbed("global").output.count("f counted over 8 sequences: 2 dp ranks x 4 micro-batches x 1") == 1
    assert undisturbed("window").output.count("f counted over 16 sequences: 2 dp ranks x 4 micro-batches x 1 x 2 steps") == 1
