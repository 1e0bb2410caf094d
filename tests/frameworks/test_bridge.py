"""Megatron Bridge trains with the plugin: its own `pretrain`, data, optimizer and checkpoints, on two ranks without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from common import environment

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".frameworks" / "bridge"

pytestmark = pytest.mark.skipif(
    not FOLDER.exists() or find_spec("megatron.training") is None,
    reason="needs Megatron Bridge in .frameworks (make test-frameworks) and megatron.training",
)


def train(**options) -> str:
    """The log of one training."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "bridge_train.py")]
    command = [sys.executable, *launcher, json.dumps({"iterations": 3, **options})]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=environment(FOLDER), text=True, timeout=300, **output)
    assert done.returncode == 0, done.stdout
    return done.stdout


def parameters(log: str) -> str:
    """A checksum of the model at the training's end, the same on both ranks."""
    (found,) = set(re.findall(r"parameters (\w{64})", log))
    return found


def balance(log: str) -> list[float]:
    return [float(number) for number in re.findall(r"load_balancing_loss: ([0-9.E+-]+)", log)]


@pytest.fixture(scope="module")
def plain():
    return train()


def test_micro_is_bridge_as_it_is(plain):
    log = train(register={"scope": "micro"})
    assert parameters(log) == parameters(plain)


def test_global(plain):
    log = train(register={"scope": "global"})
    assert parameters(log) != parameters(plain)
    assert len(balance(log)) == 3 and all(0.99 < number < 1.2 for number in balance(log))


def test_bridges_global_loss_is_taken_over():
    log = train(register={"scope": "global"}, type="global_aux_loss")
    assert log.count("the strength rises by a factor of 2") == 1
    assert parameters(log) == parameters(train(register={"scope": "global"}))
