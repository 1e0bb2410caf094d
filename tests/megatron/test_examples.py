"""The launch scripts: Megatron accepts every flag at the size they are made for, and all train here with CPU=1."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NODES = {"data_parallel": 1, "tensor_data": 4, "expert_data": 4, "tensor_expert_pipeline_context": 4}


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script from this repository's root with a clean environment of settings."""
    outer = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *arguments],
        cwd=ROOT,
        env={**outer, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def dry_run(script: str, *arguments: str, **environment: str) -> list[str]:
    """The words of the command that DRY_RUN=1 prints, as a shell reads them."""
    result = launch(script, *arguments, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {result.stdout}"], capture_output=True, text=True, check=True)
    return words.stdout.split("\0")[:-1]


def training(words: list[str]) -> list[str]:
    """The script and its flags: what comes after the launcher."""
    argv = words[words.index("megatron_global_lbl") + 1 :]
    return argv[1:] if argv[0] == "--cpu" else argv


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """Megatron's validated arguments of every script at full size, and shrunk."""
    run = tmp_path_factory.mktemp("run")
    cases = {}
    for name, nodes in NODES.items():
        words = dry_run(f"{name}.sh", NNODES=str(nodes), RUN_DIR=str(run))
        cases[name] = {"world": 8 * nodes, "argv": training(words)}
        cases[f"{name} on CPU"] = {"world": 4, "argv": training(dry_run(f"{name}.sh", CPU="1"))}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "parse_only.py")], input=json.dumps(cases), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name, sizes, data_parallel",
    [
        ("data_parallel", (1, 1, 1, 1, 1), 8),
        ("data_parallel on CPU", (1, 1, 1, 1, 1), 4),
        ("tensor_data", (8, 1, 1, 1, 8), 4),
        ("tensor_data on CPU", (2, 1, 1, 1, 2), 2),
        ("expert_data", (1, 1, 1, 8, 1), 32),
        ("expert_data on CPU", (1, 1, 1, 4, 1), 4),
        ("tensor_expert_pipeline_context", (2, 4, 2, 8, 1), 2),
        ("tensor_expert_pipeline_context on CPU", (2, 1, 2, 2, 1), 1),
    ],
)
def test_megatron_accepts_the_flags(parsed, name, sizes, data_parallel):
    args = parsed[name]
    kinds = ("tensor_model", "context", "pipeline_model", "expert_model", "expert_tensor")
    found = tuple(args[f"{kind}_parallel_size"] for kind in kinds)
    assert (found, args["data_parallel_size"]) == (sizes, data_parallel)
    assert args["moe_lbl_scope"] == "global"
    assert args.get("moe_lbl_metrics_dir") == (None if "CPU" in name else str(Path(args["save"]).with_name("balance")))


@pytest.mark.parametrize(
    "name, total, active",
    [
        # The paper's names for the model; the model cards of the others.
        ("data_parallel", 3.4, 0.6),
        ("tensor_data", 46.7, 12.9),
        ("expert_data", 30.5, 3.3),
        ("tensor_expert_pipeline_context", 30.5, 3.3),
    ],
)
def test_models_have_the_size_they_are_named_for(parsed, name, total, active):
    a = parsed[name]
    heads = a["num_attention_heads"] * a["kv_channels"]
    attention = a["hidden_size"] * 2 * (heads + a["num_query_groups"] * a["kv_channels"])
    expert = 3 * a["hidden_size"] * a["moe_ffn_hidden_size"]
    shared = 3 * a["hidden_size"] * a.get("moe_shared_expert_intermediate_size", 0)
    router = a["hidden_size"] * a["num_experts"]
    rows = 32000 if name == "tensor_data" else 151936
    embeddings = rows * a["hidden_size"] * (2 if a["untie_embeddings_and_output_weights"] else 1)
    layer = attention + shared + router
    assert (a["num_layers"] * (layer + a["num_experts"] * expert) + embeddings) / 1e9 == pytest.approx(total, abs=0.06)
    assert (a["num_layers"] * (layer + a["moe_router_topk"] * expert) + embeddings) / 1e9 == pytest.approx(active, abs=0.06)


@pytest.mark.parametrize("name", NODES)
def test_trains_on_this_machine(name):
    result = launch(f"{name}.sh", CPU="1", TRAIN_ITERS="2")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert re.findall(r"iteration +(\d+)/ +2 ", result.stdout) == ["1", "2"]
    assert "> moe-lbl: scope global; f will be counted over the global batch" in result.stdout
    assert result.stderr.count("CPU=1:") == 1


def test_last_flags_and_environment_win():
    words = dry_run("data_parallel.sh", "--lr", "1", CPU="1", MICRO_BATCH="2", LBL_SCOPE="dp", LBL_GROUP_SIZE="2")
    last = {flag: value for flag, value in zip(words, words[1:], strict=False) if flag.startswith("--")}
    assert (last["--lr"], last["--micro-batch-size"], last["--moe-lbl-group-size"]) == ("1", "2", "2")


def test_data_and_many_nodes():
    environment = {"DATA_PATH": "0.3 a 0.7 b", "TOKENIZER_MODEL": "Qwen/Qwen3-30B-A3B", "NNODES": "4", "NODE_RANK": "3"}
    words = dry_run("expert_data.sh", **environment, MASTER_ADDR="node-0")
    text = " ".join(words)
    assert "--data-path 0.3 a 0.7 b --split" in text and "--mock-data" not in text
    assert "--nnodes 4 --node-rank 3 --master-addr node-0 --master-port 29500 --nproc-per-node 8" in text


@pytest.mark.parametrize(
    "environment, line",
    [
        ({"GPUS_PER_NODE": "6", "TP": "4"}, "= 6 processes; allowed: a multiple of TP 4 x CP 1 x PP 1 = 4"),
        ({"LBL_SCOPE": "globl"}, "LBL_SCOPE globl: unknown; allowed: micro, dp, global"),
        ({"TP": "4", "PP": "4"}, "= 8 processes; allowed: a multiple of TP 4 x CP 1 x PP 4 = 16; NNODES=2 would do\n"),
        ({"GPUS_PER_NODE": "4", "EP": "16"}, "a divisor of TP 1 x CP 1 x DP 4 = 4; NNODES=4 would do\n"),
        ({"EP": "3"}, "EP 3 x ETP 1; allowed: a divisor of TP 1 x CP 1 x DP 8 = 8"),
        ({"MEGATRON_LM_DIR": "/nowhere"}, "MEGATRON_LM_DIR /nowhere: no pretrain_gpt.py in it"),
        ({"DATA_PATH": "a"}, "DATA_PATH is set, TOKENIZER_MODEL is not"),
    ],
)
def test_refuses_bad_settings(environment, line):
    result = launch("data_parallel.sh", DRY_RUN="1", **environment)
    assert result.returncode == 2 and result.stdout == ""
    assert line in result.stderr


@pytest.mark.parametrize("script", ["one_node.sbatch", "multi_node.sbatch", "sweep.sbatch", "job.sh", "node.sh"])
def test_says_that_it_is_not_in_a_slurm_job(script):
    result = launch(f"slurm/{script}", "examples/data_parallel.sh")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{script}: error: not in a SLURM job; ")


@pytest.mark.parametrize(
    "script, nodes, trainings",
    [("one_node.sbatch", 1, 1), ("multi_node.sbatch", 4, 1), ("sweep.sbatch", 1, 5), ("job.sh", 1, 1)],
)
def test_a_dry_run_needs_no_slurm(tmp_path, script, nodes, trainings):
    """It prints what a job starts, and makes nothing."""
    run = tmp_path / "run"
    result = launch(f"slurm/{script}", "examples/data_parallel.sh", "--seed", "7", DRY_RUN="1", RUN_DIR=str(run))
    assert result.returncode == 0 and not run.exists(), result.stderr
    text = result.stdout.replace("\\\n", " ")
    assert text.count(f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 ") == trainings
    assert text.count("-m megatron_global_lbl") == trainings and text.count("--seed 7") == 2 * trainings
    assert ("--nnodes 4 --node-rank 0 --master-addr node-0" in re.sub(" +", " ", text)) == (nodes > 1)
    scopes = re.findall(r"--moe-lbl-scope +(\S+)", text)
    assert scopes == (["dp", "dp", "dp", "dp", "global"] if trainings > 1 else ["global"])


def test_a_source_tree_finds_the_python_that_runs_it(tmp_path):
    """Its Makefile calls python3 and python3-config, wherever the PATH has them."""
    (tmp_path / "pretrain_gpt.py").touch()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo /base || echo "$PATH"\n')
    python.chmod(0o755)
    result = launch("data_parallel.sh", CPU="1", MEGATRON_LM_DIR=str(tmp_path), PYTHON=str(python))
    assert result.stdout.startswith(f"{python.parent}:/base/bin:"), result.stderr
