"""Launcher + `pretrain`: trains, saves, resumes bit-identically in every scope; `micro` is Megatron itself."""

from __future__ import annotations

import pytest
from launch import Run, train

# Layouts differ so that the checkpoints do: bf16 with the distributed optimizer, EP, pipeline stages, both formats.
LAYOUTS = {
    "micro": (2, []),
    "dp": (2, ["--bf16", "--use-distributed-optimizer"]),
    "global": (2, ["--expert-model-parallel-size", "2", "--ckpt-format", "torch"]),
    "global-pp2": (4, ["--pipeline-model-parallel-size", "2"]),
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
            runs[scope] = train(directory, "--moe-lbl-scope", scope.partition("-")[0], *arguments, *save, processes=processes)
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
    resumed = train(tmp_path, "--moe-lbl-scope", scope.partition("-")[0], *arguments, *load, processes=processes)
    assert resumed.curve() == {step: curve[step] for step in (4, 5, 6)}


def test_micro_is_megatron_bit_by_bit(undisturbed, tmp_path):
    plain = train(tmp_path, plugin=False)
    assert plain.curve() == undisturbed("micro").curve()


def test_scopes_are_really_different(undisturbed):
    """Else the tests above would pass with a hook that does nothing (same layout: dp 2, fp32)."""
    assert undisturbed("global").curve()[2] != undisturbed("micro").curve()[2]


def test_says_once_what_is_counted(undisturbed):
    assert undisturbed("global").output.count("f will be counted over the global batch") == 1
