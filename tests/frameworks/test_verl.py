"""verl trains with the plugin: its SFT trainer and its Megatron engine, on two ranks without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from common import environment

torch = pytest.importorskip("torch")

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".frameworks" / "verl"

pytestmark = pytest.mark.skipif(
    not FOLDER.exists() or find_spec("megatron.training") is None,
    reason="needs verl in .frameworks (make test-frameworks) and megatron.training",
)

LOSS = {"transformer": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1.0}}
REPLAY = {"overrides": ["engine.router_replay.mode=R2"]}
GLOBAL = {"scope": "global", "metrics": "brief"}
# What verl's `external_lib` registers (None: nothing), and verl's settings. Replay last: its patch of the router stays.
TRAININGS = {
    "default": (None, {}),
    "loss": (None, LOSS),
    "micro": ({"scope": "micro"}, LOSS),
    "global": (GLOBAL, LOSS | {"mini_batches": 2}),
    "no_loss": (GLOBAL, {}),
    "replay": (GLOBAL, LOSS | REPLAY),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """By training what `verl_train.py` kept of it. All in one process per rank, since what costs is verl's import."""
    folder = tmp_path_factory.mktemp("verl")

    def run(*command: str, timeout: int) -> None:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run([sys.executable, *command], env=environment(FOLDER, folder), text=True, timeout=timeout, **output)
        assert done.returncode == 0, done.stdout

    trainings = {}
    for name, (register, settings) in TRAININGS.items():
        trainings[name] = dict(settings)
        if register is not None:
            library = f"moe_lbl_{name}"  # a module of its own: a second import of one would register nothing
            (folder / f"{library}.py").write_text(f"import megatron_global_lbl as lbl\n\nhandle = lbl.register(**{register})\n")
            trainings[name]["external_lib"] = library
    run(str(HERE / "verl_files.py"), str(folder), timeout=60)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*launcher, str(HERE / "verl_train.py"), str(folder), json.dumps(trainings), timeout=570)
    return torch.load(folder / "results.pt", weights_only=True)


def test_micro_is_verl_as_it_is(results):
    assert results["micro"]["parameters"] == results["loss"]["parameters"] != results["default"]["parameters"]


def test_global_counts_the_batch_of_an_optimizer_step(results):
    steps = results["global"]["steps"]
    # Two batches of 16 conversations on the SFT trainer, then one in two mini-batches. Validation between them is not counted.
    assert [step["micro_batches"] for step in steps] == [8, 8, 4, 4]
    for step in steps:
        assert step["metrics"]["moe_lbl/lbl_global"] == pytest.approx(step["loss"], rel=1e-6)
        # A mean over the step's micro-batches, of which f counts those so far.
        assert step["tokens"] / 2 < step["metrics"]["moe_lbl/balance_tokens"] <= step["tokens"]


@pytest.mark.parametrize(("training", "formula", "other"), [("global", "global", "micro"), ("loss", "micro", "global")])
def test_gradient_is_that_of_the_formula(results, training, formula, other):
    """Of the last router's weight in the first step, whose forward is the same with and without the loss."""
    first, without = results[training]["steps"][0], results["default"]["steps"][0]
    gradient = first["gradient"] - without["gradient"]

    def distance(name: str) -> float:
        expected = first[f"{name}_gradient"]
        return float((gradient - expected).norm() / expected.norm())

    assert distance(formula) < 4e-3  # the parameters are bfloat16 in verl, and so is each micro-batch's gradient: 2 ** -8
    assert distance(other) > 0.1


def test_verl_leaves_the_loss_out_and_the_second_step_says_so(results):
    assert len(results["no_loss"]["steps"]) == 1
    assert "--moe-lbl-scope global has nothing to act on" in results["no_loss"]["error"]


def test_router_replay_is_refused_in_the_first_step(results):
    assert not results["replay"]["steps"]
    assert "TopKRouter.routing was replaced after `register`" in results["replay"]["error"]
