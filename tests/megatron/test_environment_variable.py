"""MEGATRON_GLOBAL_LBL in the environment, with the package installed: processes that run none of the user's code for it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import ROOT, TIMEOUT_SECONDS, TINY

from megatron_global_lbl.metrics import read

HERE = Path(__file__).parent
VARIABLE = "MEGATRON_GLOBAL_LBL"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Callable[[str], Path]:
    """The Python of a virtual environment with this package, installed as a user does; PyTorch and Megatron are ours."""

    @functools.cache
    def install(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "docs"))
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        # Only its path: the .pth files in there are not read.
        (site,) = (folder / "venv" / "lib").glob("*/site-packages")
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        how = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "-q"]
        target = ["-e", folder / "checkout"] if kind == "editable" else [folder / "checkout"]
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *how, *target], check=True, env=clean())
        return python

    return install


def clean(**variables: str) -> dict[str, str]:
    """An environment in which only what is installed is found."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", VARIABLE, "RANK")}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}


def run(python: Path, *command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    words = [str(python), "-W", "ignore", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=clean(**variables), cwd=cwd)


SPAWN = """
import multiprocessing, sys

def child(queue):
    import megatron.core.pipeline_parallel.schedules
    registry = sys.modules.get("megatron_global_lbl.registry")
    handle = registry and registry.active()
    router = sys.modules["megatron.core.transformer.moe.router"]
    queue.put((handle and handle.settings.scope.value, "__wrapped__" in vars(router.TopKRouter.routing)))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(*queue.get(timeout=200), "megatron.core" in sys.modules)
    process.join()
"""


@pytest.mark.parametrize("kind, variable", [("wheel", "scope=dp"), ("editable", "scope=dp"), ("wheel", "")])
def test_registers_in_processes_that_are_spawned(installed, tmp_path, kind, variable):
    """Whatever the process imports of Megatron first. Without the variable nothing of the package is imported."""
    (tmp_path / "spawn.py").write_text(SPAWN)
    result = run(installed(kind), "spawn.py", cwd=tmp_path, **{VARIABLE: variable})
    expected = "dp True False" if variable else "None False False"
    assert result.stdout == f"{expected}\n", result.stderr


WINS = """
import os
import megatron_global_lbl as lbl
from megatron_global_lbl import registry, startup

def again(variable):
    (registry.active() and registry.active().remove())
    startup.stop()
    os.environ["MEGATRON_GLOBAL_LBL"] = variable
    startup.watch()
    return registry.active()

print("- before the import")
handle = lbl.register(scope="dp")
assert registry.active() is handle and len(handle.hooked) > 5
print("- the same")
handle = again("scope=global")
assert handle.by_environment and handle.settings.scope.value == "global"
assert lbl.register(scope="global") is handle
print("- more")
again("scope=global")
assert lbl.register(scope="global", metrics="brief") is registry.active()
print("- another")
again("scope=global metrics_dir=d")
with lbl.registered(scope="dp") as inner:
    assert registry.active() is inner and inner.settings.scope.value == "dp"
assert registry.active() is None
print("- a flag")
import argparse, sys
from megatron_global_lbl import flags
again("scope=global")
sys.argv = ["pretrain_gpt.py", "--moe-lbl-scope", "micro"]
flags.activate(flags.add_arguments(argparse.ArgumentParser()).parse_args(sys.argv[1:]))
assert registry.active().settings.scope.value == "micro"
print("- no flag")
sys.argv = ["pretrain_gpt.py"]
handle = again("scope=global metrics_dir=never-written")
flags.activate(flags.add_arguments(argparse.ArgumentParser()).parse_args([]))
assert registry.active() is handle and not os.path.exists("never-written")
"""


def test_register_and_flags_win_and_say_so(installed, tmp_path):
    (tmp_path / "wins.py").write_text(WINS)
    result = run(installed("wheel"), "wins.py", cwd=tmp_path, **{VARIABLE: "scope=global"})
    assert result.returncode == 0, result.stderr
    said = {part.partition("\n")[0]: part.partition("\n")[2] for part in result.stdout.split("- ")[1:]}
    no_effect = r"> moe-lbl: MEGATRON_GLOBAL_LBL={} has no effect: `register` or a flag --moe-lbl-\* is given\n"
    will = r"> moe-lbl: scope global; f will be counted over the global batch .* \(MEGATRON_GLOBAL_LBL\)\n"
    record = r"> moe-lbl: the balance record will be written to {} \(MEGATRON_GLOBAL_LBL\)\n"
    assert re.fullmatch(no_effect.format("scope=global"), said["before the import"])
    assert re.fullmatch(will, said["the same"]) and re.fullmatch(will, said["more"])
    assert re.fullmatch(will + record.format("d") + no_effect.format("'scope=global metrics_dir=d'"), said["another"])
    assert re.fullmatch(will + no_effect.format("scope=global") + "> moe-lbl: .*micro.*\n", said["a flag"])
    assert re.fullmatch(will + record.format("never-written"), said["no flag"])
    assert result.stderr.endswith("no MoE layer was trained in this process, as it should be in a driver or for inference\n")


def test_a_bad_value_ends_the_import(installed, tmp_path):
    """Also where the script catches import errors, as many do around Megatron."""
    code = "try:\n    import megatron.core\nexcept ImportError:\n    print('caught')"
    result = run(installed("wheel"), "-c", code, cwd=tmp_path, **{VARIABLE: "scope=globl"})
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.endswith(
        "ConfigError: MEGATRON_GLOBAL_LBL=scope=globl: scope=globl: unknown; allowed: micro, dp, global; did you mean global?\n"
    )
    core = tmp_path / "megatron" / "core" / "transformer" / "moe"
    core.mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").write_text(
        "__version__ = '0.13.1'\nimport megatron.core.transformer.moe.router"
    )
    (core / "router.py").write_text("")
    result = run(installed("wheel"), "-c", code, cwd=tmp_path, **{VARIABLE: "scope=global"})
    assert result.returncode == 1 and result.stdout == ""
    assert "ConfigError: MEGATRON_GLOBAL_LBL=scope=global: Megatron-Core 0.13.1 is not supported" in result.stderr


def test_a_training_that_has_no_line_of_the_plugin(installed, tmp_path):
    """Its first rank writes the record; processes that only import do not hold the directory."""
    record = tmp_path / "a record"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "without_plugin.py"]
    command += [ROOT / "examples" / "pretrain_gpt_moe.py", *TINY, "--train-iters", "2"]
    result = run(installed("wheel"), *command, cwd=tmp_path, **{VARIABLE: f"scope=global metrics_dir='{record}'"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(f"a record ({VARIABLE})") == 1, "on rank 0"
    assert "no MoE layer was trained" not in result.stderr
    (written,) = read(record)
    assert written.header["scope"] == "global" and written.iterations.tolist() == [1, 2]


@pytest.mark.skipif(not os.environ.get("RAY_PATH"), reason="needs RAY_PATH, a folder with Ray installed")
def test_ray_actors(installed, tmp_path):
    """The driver parses, an actor trains: it gets the variable as part of Ray's environment."""
    (tmp_path / "actors.py").write_text(
        """
import sys, os
import ray
ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": {"MEGATRON_GLOBAL_LBL": "scope=dp"}})

@ray.remote
class Actor:
    def scope(self):
        import megatron.core.pipeline_parallel.schedules
        return sys.modules["megatron_global_lbl.registry"].active().settings.scope.value

print("actor:", ray.get(Actor.remote().scope.remote()), "driver:", "megatron_global_lbl" in sys.modules)
"""
    )
    site = Path(str(installed("wheel"))).parents[1] / "lib"
    (folder,) = site.glob("*/site-packages")
    (folder / "ray.pth").write_text(os.environ["RAY_PATH"] + "\n")
    result = run(installed("wheel"), "actors.py", cwd=tmp_path)
    assert "actor: dp driver: False\n" in result.stdout, result.stdout + result.stderr[-3000:]
