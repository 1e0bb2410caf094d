"""`python -m megatron_global_lbl SCRIPT` on scripts that use Megatron's parser half, or not at all. It is made up here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_packaging import interpreter

ROOT = Path(__file__).parents[2]
MEGATRON = """
import argparse

def add_megatron_arguments(parser):
    parser.add_argument("--num-experts", type=int)
    return parser

def validate_args(args, defaults={}):
    return args

def parse_args(ignore_unknown_args=False):
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_known_args()[0] if ignore_unknown_args else parser.parse_args()
"""
UNUSED = "megatron_global_lbl: script.py never built Megatron's argument parser, so --moe-lbl-* did nothing in this process; "
ELSEWHERE = 'MEGATRON_GLOBAL_LBL="scope=global" in the environment\n'
PARSE = "from megatron.training.arguments import parse_args, validate_args\n"


@pytest.fixture
def launch(tmp_path):
    for name, text in {"core": "__version__ = '0.19.2'\n", "training": "", "training/arguments": MEGATRON}.items():
        file = tmp_path / "megatron" / (f"{name}.py" if "/" in name else f"{name}/__init__.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "megatron" / "__init__.py").write_text("")

    def run(script: str, *arguments: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
        (tmp_path / "script.py").write_text(script)
        command = [sys.executable, "-m", "megatron_global_lbl", *before, "script.py", *arguments]
        outer = {name: value for name, value in os.environ.items() if name != "RANK"}
        environment = {**outer, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)

    return run


OWN_PARSER = "import argparse; argparse.ArgumentParser().parse_args()"
SUBPROCESS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1)'], check=True)"
OWN_KNOWN = "import argparse; argparse.ArgumentParser().parse_known_args(); print(1)"


@pytest.mark.parametrize("script, status", [(SUBPROCESS, 0), (OWN_KNOWN, 0), (OWN_PARSER, 2), ("raise SystemExit(3)", 3)])
def test_a_script_without_megatrons_parser(launch, script, status):
    result = launch(script, "--moe-lbl-scope", "global")
    assert result.returncode == status and result.stdout == ("" if status else "1\n")
    (line,) = [line for line in result.stderr.splitlines(keepends=True) if "megatron_global_lbl" in line]
    assert line.startswith(UNUSED) and line.endswith(ELSEWHERE)
    assert "megatron_global_lbl" not in launch(script, RANK="1").stderr, "once, on rank 0"
    assert "megatron_global_lbl" not in launch(script, "--help").stderr


def test_a_script_that_parses_and_does_not_validate(launch):
    result = launch(PARSE + "parse_args()", "--moe-lbl-scope", "global")
    assert result.returncode == 0
    assert "script.py parsed Megatron's arguments without `validate_args`, so --moe-lbl-* did nothing" in result.stderr


@pytest.mark.parametrize("how", ["", "ignore_unknown_args=True"])
def test_a_script_that_validates_is_not_spoken_of(launch, how):
    script = PARSE + f"args = parse_args({how}); validate_args(args); print(args.moe_lbl_scope)"
    result = launch(script, "--moe-lbl-scope", "micro", *(["--theirs"] if how else []))
    assert result.stdout.endswith("micro\n") and result.stderr == ""


def test_a_near_miss_where_unknown_flags_are_ignored(launch):
    result = launch(PARSE + "validate_args(parse_args(ignore_unknown_args=True))", "--moe-lbl-scop", "global")
    assert result.returncode == 1
    assert result.stderr == "megatron_global_lbl: error: --moe-lbl-scop: unknown flag; did you mean --moe-lbl-scope?\n"


def test_an_error_without_a_gpu_points_to_the_cpu_mode(launch):
    script = "import torch; assert torch.cuda.is_available(), 'Megatron requires CUDA.'"
    said = launch(script).stderr
    assert said.endswith(
        "AssertionError: Megatron requires CUDA.\n"
        "megatron_global_lbl: no GPU is usable here; to try a launch script without one: --cpu before the script\n"
    )


@pytest.mark.parametrize("given", ["--moe-lbl-scope", "--cpuu"])
def test_flags_before_the_script(launch, given):
    result = launch("print(1)", before=(given, "global"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith(f"error: {given} is before the script; put the script's flags behind it\n")


@pytest.mark.parametrize("script, reason", [("nowhere.py", "No such file or directory"), (".", "Is a directory")])
def test_a_script_that_cannot_be_read(launch, script, reason):
    result = launch("", before=(script,))
    assert result.returncode == 1
    assert result.stderr == (
        f"megatron_global_lbl: error: script {script}: {reason}; allowed: the path of a Megatron training script\n"
    )


def test_the_variable_needs_no_installation_with_the_launcher(launch):
    script = "from megatron_global_lbl import startup; print(startup.is_watching())"
    assert launch(script, MEGATRON_GLOBAL_LBL="scope=global").stdout == "True\n"


@pytest.mark.parametrize("command", [["-m", "megatron_global_lbl", "x.py"], ["-c", "import megatron_global_lbl"]])
def test_an_old_python_gets_a_sentence(command, tmp_path):
    python = interpreter("3.8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([python, *command], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 1
    sentence = "megatron_global_lbl needs Python 3.10 or later; this is Python 3.8"
    assert sentence in result.stderr.splitlines()[-1]
    assert command[0] != "-m" or result.stderr.startswith(sentence), "without a traceback"
