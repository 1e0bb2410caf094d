"""`megatron-lbl doctor` as a user runs it, with and without Megatron; each case in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_global_lbl.command import main
from megatron_global_lbl.command.defects import DEFECTS, MEASURED, Defect, as_release

ROOT = Path(__file__).parents[2]


PROGRESS = "megatron-lbl doctor: importing PyTorch and Megatron-Core takes some seconds ...\n"


def doctor(*arguments: str, path: Path | None = None, variable: str = "") -> subprocess.CompletedProcess:
    folders = os.pathsep.join(map(str, filter(None, [path, ROOT])))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": folders, "MEGATRON_GLOBAL_LBL": variable}
    command = [sys.executable, "-c", "from megatron_global_lbl.command import main; raise SystemExit(main())", "doctor"]
    command += arguments
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


def entry(output: str, name: str) -> str:
    """The text of an entry, its continuation lines joined."""
    (found,) = re.findall(rf"^  {re.escape(name)} +(\S.*(?:\n {{22}}\S.*)*)", output, flags=re.MULTILINE)
    return re.sub(r"\s+", " ", found)


def fake_megatron(folder: Path, version: str | None) -> Path:
    """A folder with a `megatron` package that hides the installed one; without `megatron.core` if version is None."""
    (folder / "megatron").mkdir(parents=True)
    (folder / "megatron" / "__init__.py").write_text("")
    if version is not None:
        (folder / "megatron" / "core").mkdir()
        (folder / "megatron" / "core" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return folder


def test_installed_megatron():
    result = doctor("--micro-batch-size", "8", "--global-batch-size", "256", "--data-parallel-size", "8")
    output = result.stdout
    assert result.returncode == 0, output + result.stderr
    assert result.stderr == PROGRESS, "Megatron's import warnings must not bury the findings"
    assert output.endswith("\n\nready: --moe-lbl-scope global works here\n")
    assert entry(output, "MEGATRON_GLOBAL_LBL").startswith("not set (")
    assert re.fullmatch(r"\d+\.\d+\.\d+", entry(output, "version")), "without the commit that Megatron appends"
    assert entry(output, "supported").startswith("yes")
    assert entry(output, "megatron.training") == "there: the launcher works"
    assert entry(output, "loss on a GPU").startswith("fused: Triton kernels")
    hooks = entry(output, "scope dp, global")
    for symbol in (
        "TopKRouter.routing",
        "router.topk_routing_with_score_function",
        "_allreduce_non_tensor_model_parallel_grads",
    ):
        assert symbol in hooks
    for defect in DEFECTS:
        assert entry(output, f"{defect.id} yes") == f"{defect.text} ({defect.span})"
    assert "nothing was run now" in entry(output, "from") and "benchmarks/upstream/run_all.py" in entry(output, "from")
    assert "scope global; f would be counted over 256 sequences: 8 dp ranks x 4 micro-batches x 8" in output


def test_without_megatron(tmp_path):
    # Beside it a package named apex that is not NVIDIA's, and a Transformer Engine that does not load.
    fake_megatron(tmp_path, None)
    for package in ("apex", "transformer_engine", "transformer_engine/pytorch"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").write_text("raise ImportError('undefined symbol: nvte')")
    result = doctor("--moe-lbl-scope", "dp", *sizes(8, 256, 8), path=tmp_path)
    assert result.returncode == 1 and result.stderr == PROGRESS
    assert result.stdout.endswith("\n\nnot ready: no Megatron-Core\n")
    assert entry(result.stdout, "version").startswith("NOT FOUND: no Megatron-Core found")
    assert entry(result.stdout, "PyTorch") and entry(result.stdout, "GPU").startswith("none usable here")
    assert "is an unrelated project of the same name" in entry(result.stdout, "NVIDIA Apex")
    assert entry(result.stdout, "Transformer Engine").endswith("does not import: ImportError: undefined symbol: nvte")
    assert "scope dp; f would be counted over 64 sequences: 8 dp ranks x 8" in result.stdout
    assert "scope global" not in result.stdout


def test_real_apex_is_told_from_the_other(tmp_path):
    fake_megatron(tmp_path, None)
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    assert "no amp_C" in entry(doctor(path=tmp_path).stdout, "NVIDIA Apex")
    (tmp_path / "amp_C.py").write_text("")
    assert "with its CUDA extensions" in entry(doctor(path=tmp_path).stdout, "NVIDIA Apex")


@pytest.mark.parametrize(
    "version, name, text, reason",
    [
        ("0.13.1", "supported", "NO; supported: 0.14 to 0.19, and 0.20 as a preview", "Megatron-Core 0.13.1 is not supported"),
        ("0.21.0+abc1234", "supported", "NO; supported: 0.14 to 0.19, and 0.20 as a", "Megatron-Core 0.21.0 is not supported"),
        ("0.19.2", "scope global", "TopKRouter.routing is not where it should be", "the hook does not attach"),
    ],
)
def test_megatron_that_does_not_work(tmp_path, version, name, text, reason):
    result = doctor("--megatron", str(fake_megatron(tmp_path, version)))
    assert result.returncode == 1
    assert entry(result.stdout, "version") == version.split("+")[0]
    assert text in entry(result.stdout, name)
    assert result.stdout.endswith(f"\n\nnot ready: {reason}\n")


@pytest.mark.parametrize(
    "variable, text, reason",
    [
        ("scope=Global", "scope=Global: unknown; allowed: micro, dp, global; did you mean global?", "is wrong"),
        ("scope=dp", "scope=dp: scope dp; f will be counted over the micro-batch on all data-parallel ranks (", "is not read"),
    ],
)
def test_the_environment_variable(tmp_path, variable, text, reason):
    """Without an installation nothing reads it."""
    result = without_packages(tmp_path, MEGATRON_GLOBAL_LBL=variable)
    assert text in entry(result.stdout, "MEGATRON_GLOBAL_LBL")
    assert reason == "is wrong" or "NOT READ, except by the launcher" in entry(result.stdout, "MEGATRON_GLOBAL_LBL")
    assert result.stdout.endswith(f"\n\nnot ready: no PyTorch; MEGATRON_GLOBAL_LBL {reason}\n")


@pytest.mark.parametrize("version, missing", [("0.14.0", None), ("0.15.3", {"D4", "D9"}), ("0.16.1", set())])
def test_defects_by_release(tmp_path, version, missing):
    """Of a release alone: where nothing of the hook attaches the table holds all the same."""
    output = doctor("--megatron", str(fake_megatron(tmp_path, version))).stdout
    said = dict(re.findall(r"^  (D\d) (yes|no) ", output, flags=re.MULTILINE))
    if missing is None:
        assert entry(output, "none") == "this release has no global_aux_loss (it came with 0.15)" and said == {}
    else:
        assert said == {defect.id: "no" if defect.id in missing else "yes" for defect in DEFECTS}


def test_a_mended_defect_ends():
    defect = Defect("D0", "", "", since="0.15", until="0.20")
    assert [defect.is_in((0, minor)) for minor in (14, 15, 19, 20, 21)] == [False, True, True, False, False]
    assert defect.span == "since 0.15, before 0.20"


def sizes(micro: int, globally: int, data_parallel: int) -> list[str]:
    numbers = {"micro-batch": micro, "global-batch": globally, "data-parallel": data_parallel}
    return [word for name, number in numbers.items() for word in (f"--{name}-size", str(number))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--micro-batch-size", "8"], "--global-batch-size, --data-parallel-size: not given"),
        (["--moe-lbl-scope", "dp"], "--micro-batch-size, --global-batch-size, --data-parallel-size: not given"),
        (sizes(8, 100, 8), "--global-batch-size 100: not allowed; allowed: a multiple of"),
        (sizes(0, 100, 8), "--micro-batch-size 0: not allowed; allowed: an integer >= 1"),
        (["--moe-lbl-scope", "globl", *sizes(8, 256, 8)], "--moe-lbl-scope globl: unknown"),
        (["--moe-lbl-scope", "globl"], "--moe-lbl-scope globl: unknown; allowed: micro, dp, global"),
        (["--moe-lbl-scope", "dp", "--moe-lbl-group-size", "3", *sizes(8, 256, 8)], "--moe-lbl-group-size 3: not allowed"),
        (["--megatron", "nowhere"], "--megatron nowhere: no megatron/core there"),
    ],
)
def test_bad_arguments(arguments, message):
    result = doctor(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()  # before any import: no progress
    assert line.startswith("megatron-lbl doctor: error: ") and message in line


def test_the_page_says_the_same():
    page = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    said = (
        f"Releases {', '.join(MEASURED[:-1])} and {MEASURED[-1]} have all of them, except that 0.15 has no padding mask and so "
    )
    assert said + "neither D4 nor D9. 0.14 has no `global_aux_loss`." in " ".join(page.split())
    for defect in DEFECTS:
        script = ROOT / "benchmarks" / "upstream" / defect.script
        assert f"| [{defect.id}](../benchmarks/upstream/{defect.script}) |" in page and script.is_file()
        missing = [version for version in MEASURED if not defect.is_in(as_release(version.rpartition(".")[0]))]
        assert missing == (["0.15.3"] if defect.id in ("D4", "D9") else []), defect.id
        for thread in defect.threads:
            number = thread.split("#")[1]
            assert f"#{number}" in page and f"#{number}" in script.read_text(encoding="utf-8")


def without_packages(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """As after `pip install` into an empty environment: no site-packages, only this package."""
    command = [sys.executable, "-S", "-c", "from megatron_global_lbl.command import main; raise SystemExit(main())", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_without_pytorch(tmp_path):
    result = without_packages(tmp_path)
    assert result.returncode == 1 and result.stderr == PROGRESS
    assert entry(result.stdout, "PyTorch").startswith("NOT FOUND") and result.stdout.endswith("\n\nnot ready: no PyTorch\n")


@pytest.mark.parametrize("arguments", [[], ["patch"], ["specialize"]])
def test_help_begins_with_what_it_is_for(arguments, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    said = capsys.readouterr().out
    if not arguments:
        assert said.startswith("Checks, patches and shows MoE load balancing over the global batch in Megatron-Core.\n\n")
    name = "".join(arguments).replace("specialize", "specialise") or "COMMAND"
    assert f"usage: megatron-lbl {name} " in said
